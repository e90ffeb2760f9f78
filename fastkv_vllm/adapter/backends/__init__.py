"""vLLM's attention backends that compression runs on, by vLLM's name: each module is imported when it is chosen."""

BACKENDS = {
    name: f"fastkv_vllm.adapter.backends.{module}.{cls}"
    for name, module, cls in (
        ("CPU_ATTN", "cpu", "CPUCompressionBackend"),
        ("FLASH_ATTN", "flash", "FlashCompressionBackend"),
        ("TRITON_ATTN", "triton", "TritonCompressionBackend"),
        ("FLASHINFER", "flashinfer", "FlashInferCompressionBackend"),
    )
}
