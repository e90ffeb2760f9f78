"""The bench every Triton kernel is tested on, with or without a GPU.

An op with a kernel is `fastkv_vllm/kernels/<op>/triton.py` and `tests/kernels/test_<op>.py`:

- The public function takes `impl: str | None = None`, passes it to `implementations.choose` and imports the op's
  `triton.py` inside the branch that needs it: `import fastkv_vllm...` never imports Triton.
- Launched kernels are called `_..._kernel`; jitted helpers have other names.
- `run(function, *args, **kwargs)` (a fixture) calls the public function where kernels run, with impl="triton": in
  Triton's interpreter, whose process alone has TRITON_INTERPRET, and once more on a GPU where there is one. Tensors
  keep their strides, what the op writes in place is seen, memory of `torch.empty` is NaN (integers: their maximum).
- `form` is `run` and the reference.
- Launches say `enable_fp_fusion=True`: Triton 3.10 changes the default.
- `compare.assert_same` for ops that move or select, `compare.assert_accurate` for ops that compute.
- `CALLS` in the test module: name -> function without arguments that calls the public function with impl="triton" as
  the engine will. `test_compile.py` compiles every kernel these launch for compute capability 8.0 and 9.0, without a
  GPU: nothing is computed, so sizes may be those of a real model. Every kernel of the op must be launched by one.

CUDA kernels are csrc/*.cu, bound by `fastkv_vllm/kernels/<op>/cuda.py`; their tests take `run_each` instead of `run`.
Without a GPU g++ builds the same files against `cuda_on_cpu/cuda_runtime.h`, and impl="cuda" runs that; `test_csrc.py`
looks at what nvcc makes of them, where it is installed.
"""
