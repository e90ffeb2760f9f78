"""What of vLLM the adapter relies on, read from both sources: a release that changes it shows as one red list.

`touched` finds the symbols in the adapter's code, `source` looks their signatures up in a tree or wheel of vLLM without
importing it, `signatures.json` holds what they were in the supported release and in the next. After a change of what
the adapter touches:

    python -m tests.contract.record                # the installed release
    python -m tests.contract.record WHEEL          # a release not installed, from `pip download --no-deps vllm==...`

Both write the record and the table in docs/upgrading.md.
"""
