// Two layers' keys and values merged into one direction and two magnitudes, and given back.
//
// A group of lanes holds one key or value: 16-byte loads, sums by shuffles inside the group, in float32.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "launch.h"

namespace {

// Entries of two layers in one paged cache; see LayerPair in kernels/merge_layers.
struct Pair {
    void* cache;  // [num_pages, 2, block_size, D]
    int64_t stride_page, stride_part, stride_entry, block_size;
    const int32_t* lower;    // [S, width]
    const int32_t* upper;    // [S, width]
    const int32_t* lengths;  // [S]
    int64_t num_sequences, width;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float& x, float y) { x = y; }
__device__ void from_float(__half& x, float y) { x = __float2half_rn(y); }
__device__ void from_float(__nv_bfloat16& x, float y) { x = __float2bfloat16_rn(y); }

// How a group of lanes shares the D elements of a vector.
template <typename T, int D>
struct Vector {
    static constexpr int CHUNK = 16 / sizeof(T);  // elements of a load
    static constexpr int GROUP = D / CHUNK < LANES ? D / CHUNK : LANES;
    static constexpr int CHUNKS = D / CHUNK / GROUP;
    static constexpr int SIZE = CHUNK * CHUNKS;  // elements of a lane
    static_assert(GROUP * SIZE == D && (GROUP & (GROUP - 1)) == 0, "D is a power of two, or of whole warps");

    union Chunk {
        uint4 bits;
        T elements[CHUNK];
        __device__ Chunk() : bits() {}
    };

    __device__ static void load(const T* address, bool is_there, float (&x)[SIZE]) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            Chunk chunk;  // zeros
            if (is_there) chunk.bits = reinterpret_cast<const uint4*>(address)[c * GROUP + threadIdx.x % GROUP];
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) x[c * CHUNK + i] = to_float(chunk.elements[i]);
        }
    }

    __device__ static void store(T* address, bool is_there, const float (&x)[SIZE]) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            Chunk chunk;
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) from_float(chunk.elements[i], x[c * CHUNK + i]);
            if (is_there) reinterpret_cast<uint4*>(address)[c * GROUP + threadIdx.x % GROUP] = chunk.bits;
        }
    }

    // Euclidean length of a vector; all lanes of the warp take part.
    __device__ static float norm(const float (&x)[SIZE]) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < SIZE; ++i) sum += x[i] * x[i];
#pragma unroll
        for (int offset = GROUP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
        return sqrtf(sum);
    }

    __device__ static void scale(float (&x)[SIZE], float factor) {
#pragma unroll
        for (int i = 0; i < SIZE; ++i) x[i] *= factor;
    }
};

__device__ float inverse(float norm) { return norm > 0 ? 1 / norm : 0; }  // of zero: zero stays zero

// The key or value that this group of lanes works on: vector (sequence * n + entry) * 2 + part.
template <int GROUP>
struct Place {
    int64_t number, sequence, entry, part;
    bool is_there, is_held;  // in the arrays, in the sequence

    __device__ explicit Place(const Pair& pair) {
        const int64_t num_entries = pair.width * pair.block_size;
        number = static_cast<int64_t>(blockIdx.x) * (THREADS / GROUP) + threadIdx.x / GROUP;
        part = number % 2;
        entry = number / 2 % num_entries;
        sequence = number / 2 / num_entries;
        is_there = sequence < pair.num_sequences;
        is_held = is_there && entry < pair.lengths[sequence];
    }

    // Entry `entry` of a page table.
    template <typename T>
    __device__ T* in(const Pair& pair, const int32_t* table, int64_t width, int64_t entry, bool is_needed) const {
        const int64_t page = is_needed ? table[sequence * width + entry / pair.block_size] : 0;
        return static_cast<T*>(pair.cache) + page * pair.stride_page + part * pair.stride_part +
               entry % pair.block_size * pair.stride_entry;
    }
};

template <typename T, int D>
__global__ void __launch_bounds__(THREADS)
    measure_kernel(Pair pair, float* magnitudes /* [S, n, 2, 2] */, float* chords /* [S, n, 2, 2] */) {
    using V = Vector<T, D>;
    const Place<V::GROUP> place(pair);
    float u[V::SIZE], v[V::SIZE];
    V::load(place.template in<T>(pair, pair.lower, pair.width, place.entry, place.is_held), place.is_held, u);
    V::load(place.template in<T>(pair, pair.upper, pair.width, place.entry, place.is_held), place.is_held, v);
    const float lower = V::norm(u), upper = V::norm(v);
    V::scale(u, inverse(lower));
    V::scale(v, inverse(upper));
#pragma unroll
    for (int i = 0; i < V::SIZE; ++i) {
        const float sum = u[i] + v[i];
        u[i] -= v[i];
        v[i] = sum;
    }
    const float apart = V::norm(u), together = V::norm(v);
    if (place.is_there && threadIdx.x % V::GROUP == 0) {
        magnitudes[2 * place.number] = lower;
        magnitudes[2 * place.number + 1] = upper;
        chords[2 * place.number] = apart;
        chords[2 * place.number + 1] = together;
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS)
    merge_kernel(Pair pair, const float* coefficients /* [S, n, 2, 2] */, const bool* is_merged /* [S, n] */) {
    using V = Vector<T, D>;
    const Place<V::GROUP> place(pair);
    const bool merges = place.is_held && is_merged[place.number / 2];
    const float of_lower = merges ? coefficients[2 * place.number] : 0;
    const float of_upper = merges ? coefficients[2 * place.number + 1] : 0;
    float x[V::SIZE], y[V::SIZE];
    T* out = place.template in<T>(pair, pair.lower, pair.width, place.entry, merges);
    V::load(out, merges, x);
    V::load(place.template in<T>(pair, pair.upper, pair.width, place.entry, merges), merges, y);
#pragma unroll
    for (int i = 0; i < V::SIZE; ++i) x[i] = of_lower * x[i] + of_upper * y[i];
    V::scale(x, inverse(V::norm(x)));
    V::store(out, merges, x);
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS)
    restore_kernel(Pair pair, const int32_t* shared /* [S, width] */, const int32_t* kept /* [S, kept_width] */,
                   int64_t kept_width, const float* magnitudes /* [S, n, 2, 2] */, const int32_t* places /* [S, n] */) {
    using V = Vector<T, D>;
    const Place<V::GROUP> place(pair);
    const int64_t among_kept = place.is_held ? places[place.number / 2] : -1;
    const bool is_kept = among_kept >= 0;
    float lower[V::SIZE], upper[V::SIZE], own[V::SIZE];
    V::load(place.template in<T>(pair, shared, pair.width, place.entry, place.is_held), place.is_held, lower);
    V::load(place.template in<T>(pair, kept, kept_width, is_kept ? among_kept : 0, is_kept), is_kept, own);
    const float factor = inverse(V::norm(lower));
    const float of_lower = place.is_held ? magnitudes[2 * place.number] : 0;
    const float of_upper = place.is_held ? magnitudes[2 * place.number + 1] : 0;
#pragma unroll
    for (int i = 0; i < V::SIZE; ++i) {
        const float unit = lower[i] * factor;
        lower[i] = is_kept ? lower[i] : unit * of_lower;
        upper[i] = is_kept ? own[i] : unit * of_upper;
    }
    V::store(place.template in<T>(pair, pair.lower, pair.width, place.entry, place.is_held), place.is_held, lower);
    V::store(place.template in<T>(pair, pair.upper, pair.width, place.entry, place.is_held), place.is_held, upper);
}

template <typename T, int D>
int64_t blocks_of(const Pair& pair) {
    constexpr int GROUPS = THREADS / Vector<T, D>::GROUP;
    return (pair.num_sequences * pair.width * pair.block_size * 2 + GROUPS - 1) / GROUPS;
}

template <typename T, int D>
struct Measure {
    static int run(const Pair& pair, cudaStream_t stream, float* magnitudes, float* chords) {
        return launch(stream, blocks_of<T, D>(pair), measure_kernel<T, D>, pair, magnitudes, chords);
    }
};

template <typename T, int D>
struct Merge {
    static int run(const Pair& pair, cudaStream_t stream, const float* coefficients, const bool* is_merged) {
        return launch(stream, blocks_of<T, D>(pair), merge_kernel<T, D>, pair, coefficients, is_merged);
    }
};

template <typename T, int D>
struct Restore {
    static int run(const Pair& pair, cudaStream_t stream, const int32_t* shared, const int32_t* kept,
                   int64_t kept_width, const float* magnitudes, const int32_t* places) {
        return launch(stream, blocks_of<T, D>(pair), restore_kernel<T, D>, pair, shared, kept, kept_width, magnitudes,
                      places);
    }
};

template <template <typename, int> class Op, typename T, typename... Arguments>
int run_for_width(int64_t head_dim, Arguments... arguments) {
    switch (head_dim) {
        case 64: return Op<T, 64>::run(arguments...);
        case 128: return Op<T, 128>::run(arguments...);
        case 256: return Op<T, 256>::run(arguments...);
    }
    return cudaErrorInvalidValue;
}

// dtype: 0 float32, 1 float16, 2 bfloat16.
template <template <typename, int> class Op, typename... Arguments>
int run_for(int64_t dtype, int64_t head_dim, Arguments... arguments) {
    switch (dtype) {
        case 0: return run_for_width<Op, float>(head_dim, arguments...);
        case 1: return run_for_width<Op, __half>(head_dim, arguments...);
        case 2: return run_for_width<Op, __nv_bfloat16>(head_dim, arguments...);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

// Of all three: pointers are to device memory, see Pair; cache and strides are multiples of 16 bytes, strides in elements.

extern "C" int fastkv_measure_layers(int64_t dtype, int64_t head_dim, void* cache, int64_t stride_page,
                                     int64_t stride_part, int64_t stride_entry, int64_t block_size,
                                     const int32_t* lower, const int32_t* upper, const int32_t* lengths,
                                     int64_t num_sequences, int64_t width, float* magnitudes, float* chords,
                                     cudaStream_t stream) {
    const Pair pair = {cache, stride_page, stride_part, stride_entry, block_size, lower, upper, lengths, num_sequences, width};
    return run_for<Measure>(dtype, head_dim, pair, stream, magnitudes, chords);
}

extern "C" int fastkv_merge_layers(int64_t dtype, int64_t head_dim, void* cache, int64_t stride_page,
                                   int64_t stride_part, int64_t stride_entry, int64_t block_size, const int32_t* lower,
                                   const int32_t* upper, const int32_t* lengths, int64_t num_sequences, int64_t width,
                                   const float* coefficients, const bool* is_merged, cudaStream_t stream) {
    const Pair pair = {cache, stride_page, stride_part, stride_entry, block_size, lower, upper, lengths, num_sequences, width};
    return run_for<Merge>(dtype, head_dim, pair, stream, coefficients, is_merged);
}

extern "C" int fastkv_restore_layers(int64_t dtype, int64_t head_dim, void* cache, int64_t stride_page,
                                     int64_t stride_part, int64_t stride_entry, int64_t block_size,
                                     const int32_t* lower, const int32_t* upper, const int32_t* lengths,
                                     int64_t num_sequences, int64_t width, const int32_t* shared, const int32_t* kept,
                                     int64_t kept_width, const float* magnitudes, const int32_t* places,
                                     cudaStream_t stream) {
    const Pair pair = {cache, stride_page, stride_part, stride_entry, block_size, lower, upper, lengths, num_sequences, width};
    return run_for<Restore>(dtype, head_dim, pair, stream, shared, kept, kept_width, magnitudes, places);
}
