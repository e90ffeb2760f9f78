// Launching: every function of this library returns 0 or the code of the first launch that failed.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

constexpr int THREADS = 256;  // of every thread block
constexpr int LANES = 32;     // of a warp
constexpr unsigned ALL_LANES = 0xffffffffu;

// Launch `blocks` blocks of THREADS threads; none if there is nothing to do.
template <typename... Parameters, typename... Arguments>
int launch(cudaStream_t stream, int64_t blocks, void (*kernel)(Parameters...), Arguments... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    cudaLaunchKernelEx(&config, kernel, arguments...);
    return cudaGetLastError();  // takes the error back, so that no later call reports it as its own
}
