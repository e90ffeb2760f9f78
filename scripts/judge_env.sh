#!/usr/bin/env bash
# Makes the environment of an outside judge beside .venv: its transformers range is not vLLM's. A second run changes
# nothing.
#
#   scripts/judge_env.sh kvpress|lm-eval [--torch-index URL]
#
#   kvpress   .venv-kvpress: NVIDIA's kvpress on transformers and torch's CPU build, for benchmarks.oracle.compare
#   lm-eval   .venv-lm-eval: EleutherAI's lm-evaluation-harness as a client of a server, no torch, for benchmarks.lm_eval
#
#   PYTHON               interpreter to build it with (default python3; 3.11 or newer)
#   FASTKV_TORCH_INDEX   same as --torch-index: where pip finds torch's CPU wheel (see scripts/setup.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH=2.13.0 USAGE='scripts/judge_env.sh kvpress|lm-eval [--torch-index URL]'
torch_index=${FASTKV_TORCH_INDEX:-} name=

die() {
    printf 'judge_env: %s\n' "$*" >&2
    exit 1
}

say() {
    printf 'judge_env: %s\n' "$*"
}

pip_install() { # errors only
    "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check install "$@"
}

# What the environment must be built from; a change here means work to do.
fingerprint() {
    cksum <scripts/judge_env.sh
}

# Cheap look at what is really there: every pinned package in its version, and torch without CUDA or not at all.
holds() {
    "$venv/bin/python" - "${pins[@]}" <<'PY' >/dev/null 2>&1
import sys
from importlib.metadata import distributions, version

for pin in sys.argv[1:]:
    name, _, wanted = pin.partition("==")
    assert version(name.partition("[")[0]).split("+")[0] == wanted, pin
assert not [d.name for d in distributions() if d.name.startswith("nvidia-")], "a CUDA build"
PY
}

make_venv() {
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || die "'$python' is not Python 3.11 or newer ($("$python" -V 2>/dev/null || echo missing)); set PYTHON to one that is."
    say "making $venv with $("$python" -V)"
    "$python" -m venv "$venv" || { rm -rf "$venv"; die "'$python -m venv' failed; install the venv module (Debian: python3-venv)."; }
    printf '*\n' >"$venv/.gitignore"
}

# First and without dependencies, so that no later package asks pip for the CUDA build of several GB.
install_torch() {
    local torch=torch==$TORCH index=()
    [[ $(uname -s) == Linux ]] && torch+=+cpu
    [[ -n $torch_index ]] && index=(--index-url "$torch_index")
    say "installing $torch"
    pip_install --no-deps ${index[@]+"${index[@]}"} "$torch" \
        || die "pip found no $torch; name PyTorch's CPU wheel index with --torch-index URL or FASTKV_TORCH_INDEX."
}

while (($#)); do
    case $1 in
        --torch-index) (($# > 1)) || die "--torch-index needs a URL."; torch_index=$2; shift 2 ;;
        kvpress | lm-eval) [[ -z $name ]] || die "one name at a time; usage: $USAGE"; name=$1; shift ;;
        *) die "unknown argument '$1'; usage: $USAGE" ;;
    esac
done
case $name in
    kvpress) pins=("torch==$TORCH" kvpress==0.5.5 transformers==5.2.0) check='import kvpress' ;;
    lm-eval) pins=('lm_eval[api]==0.4.13' transformers==5.19.0) check='import lm_eval.models.openai_completions' ;;
    *) die "which one? usage: $USAGE" ;;
esac
readonly venv=.venv-$name
readonly stamp=$venv/judge-env.stamp

wanted=$(fingerprint)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && holds; then
    exit 0
fi
[[ -x $venv/bin/python ]] || make_venv
[[ $name == kvpress ]] && install_torch
say "installing ${pins[*]} (a few minutes)"
pip_install "${pins[@]}" || die "pip could not install: ${pins[*]}"
holds || die "$venv is not what it should be; delete it and run again."
HF_HUB_OFFLINE=1 "$venv/bin/python" -c "$check" || die "'$check' fails in $venv; see the error above."
printf '%s\n' "$wanted" >"$stamp"
say "ready: $venv, $(du -sh "$venv" | cut -f 1)"
