// Stands in for CUDA's header of this name, so that g++ builds csrc/ into a library that runs on the CPU.
//
// Each thread of a block is a fiber. Fibers run one after the other, in another order each time, and change only where
// the threads of a block or warp wait for each other: what a missing barrier breaks shows. A barrier that not all threads
// reach, or a vector load that is not aligned, ends the process. Blocks run one after the other, in any order.
#pragma once

#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1) : x(x) {}
};
struct uint4 {
    alignas(16) uint32_t x;
    uint32_t y, z, w;
};
using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

enum class Wait { none, warp, block, end };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    Wait wait = Wait::none;
    uint32_t offered = 0;  // to the other lanes
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 order;
inline cudaError_t last_error = cudaSuccess;

inline void wait(Wait what) {
    Fiber& own = fibers[threadIdx.x];
    own.wait = what;
    swapcontext(&own.context, &scheduler);
}

inline void enter() {
    body();
    wait(Wait::end);
}

inline void release(size_t first, size_t end, Wait what) {
    const auto waits = [what](const Fiber& fiber) { return fiber.wait == what; };
    if (std::all_of(fibers.begin() + first, fibers.begin() + end, waits))
        for (size_t t = first; t < end; ++t) fibers[t].wait = Wait::none;
}

// Run the fibers of a warp until each of them waits; whether any ran.
inline bool run_warp(size_t first) {
    const size_t end = std::min(first + 32, fibers.size());
    std::vector<unsigned> turns;
    for (size_t t = first; t < end; ++t)
        if (fibers[t].wait == Wait::none) turns.push_back(t);
    std::shuffle(turns.begin(), turns.end(), order);
    for (unsigned t : turns) {
        threadIdx.x = t;
        swapcontext(&scheduler, &fibers[t].context);
    }
    release(first, end, Wait::warp);
    return !turns.empty();
}

// A warp runs as far ahead of the others as the block's barriers let it.
inline void run_block() {
    for (Fiber& fiber : fibers) {
        fiber.wait = Wait::none;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<size_t> warps;
    for (size_t first = 0; first < fibers.size(); first += 32) warps.push_back(first);
    for (bool ran = true; ran;) {
        ran = false;
        std::shuffle(warps.begin(), warps.end(), order);
        for (size_t first : warps)
            while (run_warp(first)) ran = true;
        release(0, fibers.size(), Wait::block);
    }
    for (const Fiber& fiber : fibers)
        if (fiber.wait != Wait::end) std::fputs("cuda_on_cpu: not all threads reach the same barrier\n", stderr), std::abort();
}

// What lane `lane` of the own warp offers.
inline uint32_t exchange(uint32_t value, unsigned lane) {
    const unsigned own = threadIdx.x;
    fibers[own].offered = value;
    wait(Wait::warp);
    const uint32_t taken = fibers[own / 32 * 32 + lane].offered;
    wait(Wait::warp);
    return taken;
}

template <typename T>
T exchange_bits(T value, unsigned lane) {
    static_assert(sizeof(T) == 4);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = exchange(bits, lane);
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::Wait::block); }

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned offset) {
    const unsigned lane = threadIdx.x % 32;
    return cuda_on_cpu::exchange_bits(value, lane < offset ? lane : lane - offset);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    return cuda_on_cpu::exchange_bits(value, threadIdx.x % 32 ^ mask);
}

template <typename T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    if (cuda_on_cpu::last_error) return cuda_on_cpu::last_error;
    gridDim = config->gridDim, blockDim = config->blockDim;
    cuda_on_cpu::fibers.resize(blockDim.x);
    cuda_on_cpu::body = [=] { kernel(arguments...); };
    std::vector<unsigned> turns(gridDim.x);
    for (size_t b = 0; b < turns.size(); ++b) turns[b] = b;
    std::shuffle(turns.begin(), turns.end(), cuda_on_cpu::order);
    for (unsigned b : turns) {
        blockIdx.x = b;
        cuda_on_cpu::run_block();
    }
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
    const cudaError_t error = cuda_on_cpu::last_error;
    cuda_on_cpu::last_error = cudaSuccess;
    return error;
}

// Let the next launch fail.
extern "C" __attribute__((used)) inline void cuda_on_cpu_fail() {
    cuda_on_cpu::last_error = cudaErrorInvalidConfiguration;
}

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t count, cudaStream_t) {
    std::memset(address, value, count);
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess             ? "no error"
           : error == cudaErrorInvalidValue ? "invalid argument"
                                            : "invalid configuration argument";
}
