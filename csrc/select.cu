// Highest scores of each row, ties by the lower column, columns ascending: a radix search for the lowest score that
// stays, then a count and a scatter in order. Integers only, so the result is exact and the same in every run.
//
// A row is cut into segments of whole tiles, one thread block each. Three launches count the digits of the ordered keys
// (11, 11 and 10 bits, the highest first), each among the entries that begin like the threshold; the fourth counts what
// each segment keeps; the fifth writes. The row is read five times and nothing else of its size is stored.

#include <cuda_runtime.h>
#include <stdint.h>

#include "launch.h"

namespace {

constexpr int PASSES = 3;
constexpr int BINS = 2048;
constexpr int BINS_PER_THREAD = BINS / THREADS;
constexpr int VECTOR = 4;   // scores of a 16-byte load
constexpr int VECTORS = 4;  // loads of a thread in flight
constexpr int STRIPE = THREADS * VECTOR;
constexpr int TILE = STRIPE * VECTORS;
constexpr int WARPS = THREADS / LANES;

__host__ __device__ constexpr int width_of(int pass) { return pass < 2 ? 11 : 10; }
__host__ __device__ constexpr int shift_of(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }

struct Rows {
    const float* scores;      // [R, N], columns side by side
    int64_t stride;           // from row to row, elements
    const int64_t* num_kept;  // [R]
    const int64_t* lengths;   // [R], columns of the row that count
    const int64_t* starts;    // [R], place of a row's first result
    int64_t num_rows;
    int64_t num_segments;  // of a row
    int64_t segment_size;  // columns, whole tiles
};

// The part of a row that belongs to this thread block.
struct Segment {
    int64_t row, number, begin, end;
    const uint32_t* bits;
    bool is_aligned;
};

struct Threshold {
    uint32_t key;  // its leading digits; after the last pass the whole key
    int32_t ties;  // entries to take among those that begin like it
};

__device__ Segment own_segment(const Rows& rows) {
    Segment segment;
    segment.row = blockIdx.x / rows.num_segments;
    segment.number = blockIdx.x % rows.num_segments;
    segment.begin = segment.number * rows.segment_size;
    const int64_t end = segment.begin + rows.segment_size, length = rows.lengths[segment.row];
    segment.end = end < length ? end : length;
    segment.bits = reinterpret_cast<const uint32_t*>(rows.scores + segment.row * rows.stride);
    segment.is_aligned = reinterpret_cast<uintptr_t>(segment.bits) % 16 == 0;
    return segment;
}

// Unsigned integer that orders as the score does: -inf lowest, both zeros alike, NaN above +inf.
__device__ uint32_t ordered(uint32_t bits) {
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A thread's keys of a tile, stripe by stripe.
struct Keys {
    uint32_t key[VECTORS][VECTOR];
    int present[VECTORS];  // leading ones that lie in the segment
};

__device__ Keys load(const Segment& segment, int64_t tile) {
    Keys keys;
    const uint32_t* bits = segment.bits + tile + threadIdx.x * VECTOR;
    if (segment.is_aligned && tile + TILE <= segment.end) {  // the same for all threads: VECTORS loads in a row
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const uint4 loaded = *reinterpret_cast<const uint4*>(bits + v * STRIPE);
            keys.key[v][0] = loaded.x, keys.key[v][1] = loaded.y, keys.key[v][2] = loaded.z, keys.key[v][3] = loaded.w;
            keys.present[v] = VECTOR;
        }
    } else {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t left = segment.end - tile - v * STRIPE - threadIdx.x * VECTOR;
            keys.present[v] = left < 0 ? 0 : left < VECTOR ? static_cast<int>(left) : VECTOR;
            for (int i = 0; i < VECTOR; ++i) keys.key[v][i] = i < keys.present[v] ? bits[v * STRIPE + i] : 0;
        }
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
        for (int i = 0; i < VECTOR; ++i) keys.key[v][i] = ordered(keys.key[v][i]);
    return keys;
}

// Replace each of a thread's values by their sums over the threads before it; `totals` are those over all threads.
template <int COUNT>
__device__ void exclusive_scan(uint32_t (&values)[COUNT], uint32_t (&totals)[COUNT]) {
    __shared__ uint32_t of_warp[COUNT][WARPS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    uint32_t own[COUNT];
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
        own[c] = values[c];
        for (int offset = 1; offset < LANES; offset *= 2) {
            const uint32_t before = __shfl_up_sync(ALL_LANES, values[c], offset);
            if (lane >= offset) values[c] += before;
        }
        if (lane == LANES - 1) of_warp[c][warp] = values[c];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
        values[c] -= own[c];
        totals[c] = 0;
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) values[c] += of_warp[c][w];
            totals[c] += of_warp[c][w];
        }
    }
    __syncthreads();  // of_warp may be written again
}

// Highest digit that leaves room for `threshold.ties` entries at or above it, appended to the key.
__device__ Threshold refine(Threshold threshold, const int32_t* histogram, int width) {
    __shared__ Threshold found;
    const int top = BINS - 1 - threadIdx.x * BINS_PER_THREAD;  // each thread looks at bins top, top - 1, ...
    const int32_t wanted = threshold.ties;
    int32_t bins[BINS_PER_THREAD];
    uint32_t before[1] = {0}, total[1];
#pragma unroll
    for (int b = 0; b < BINS_PER_THREAD; ++b) {
        bins[b] = histogram[top - b];
        before[0] += bins[b];
    }
    // Where nothing is wanted no digit is found: the highest key then, and none of its ties.
    if (threadIdx.x == 0) found = {(threshold.key << width) | ((1u << width) - 1), 0};
    exclusive_scan(before, total);
    int32_t above = before[0];
    for (int b = 0; b < BINS_PER_THREAD; ++b) {
        if (above < wanted && wanted <= above + bins[b])
            found = {(threshold.key << width) | static_cast<uint32_t>(top - b), wanted - above};
        above += bins[b];
    }
    __syncthreads();
    threshold = found;
    __syncthreads();  // found may be written again
    return threshold;
}

// What the first `passes` histograms say about a row; every block of the row finds the same.
__device__ Threshold threshold_of(const Rows& rows, int64_t row, const int32_t* histograms, int passes) {
    Threshold threshold = {0, static_cast<int32_t>(rows.num_kept[row])};
    for (int pass = 0; pass < passes; ++pass)
        threshold = refine(threshold, histograms + (pass * rows.num_rows + row) * BINS, width_of(pass));
    return threshold;
}

template <int PASS>
__global__ void __launch_bounds__(THREADS) histogram_kernel(Rows rows, int32_t* histograms /* [PASSES, R, BINS] */) {
    __shared__ int32_t bins[BINS];
    const Segment segment = own_segment(rows);
    const uint32_t prefix = threshold_of(rows, segment.row, histograms, PASS).key;
    for (int b = threadIdx.x; b < BINS; b += THREADS) bins[b] = 0;
    __syncthreads();
    for (int64_t tile = segment.begin; tile < segment.end; tile += TILE) {
        const Keys keys = load(segment, tile);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
            for (int i = 0; i < VECTOR; ++i) {
                const uint32_t digits = keys.key[v][i] >> shift_of(PASS);
                if (i < keys.present[v] && (PASS == 0 || digits >> width_of(PASS) == prefix))
                    atomicAdd(&bins[digits & ((1u << width_of(PASS)) - 1)], 1);
            }
    }
    __syncthreads();
    int32_t* sums = histograms + (PASS * rows.num_rows + segment.row) * BINS;
    for (int b = threadIdx.x; b < BINS; b += THREADS)
        if (bins[b]) atomicAdd(&sums[b], bins[b]);
}

__global__ void __launch_bounds__(THREADS)
    count_kernel(Rows rows, const int32_t* histograms, uint32_t* tallies /* [R, segments, 2]: above, ties */) {
    const Segment segment = own_segment(rows);
    const uint32_t key = threshold_of(rows, segment.row, histograms, PASSES).key;
    uint32_t counts[2] = {0, 0}, totals[2];
    for (int64_t tile = segment.begin; tile < segment.end; tile += TILE) {
        const Keys keys = load(segment, tile);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
            for (int i = 0; i < VECTOR; ++i)
                if (i < keys.present[v]) {
                    counts[0] += keys.key[v][i] > key;
                    counts[1] += keys.key[v][i] == key;
                }
    }
    exclusive_scan(counts, totals);
    if (threadIdx.x == 0) {
        tallies[2 * blockIdx.x] = totals[0];
        tallies[2 * blockIdx.x + 1] = totals[1];
    }
}

// Entries above the threshold, and ties with it, in the segments before this one.
__device__ void count_before(const Rows& rows, const Segment& segment, const uint32_t* tallies, uint32_t (&before)[2]) {
    uint32_t counts[2] = {0, 0};
    const uint32_t* own = tallies + 2 * segment.row * rows.num_segments;
    for (int64_t s = threadIdx.x; s < segment.number; s += THREADS) {
        counts[0] += own[2 * s];
        counts[1] += own[2 * s + 1];
    }
    exclusive_scan(counts, before);
}

__global__ void __launch_bounds__(THREADS) scatter_kernel(Rows rows, const int32_t* histograms, const uint32_t* tallies,
                                                          int64_t* columns /* [sum of num_kept] */) {
    const Segment segment = own_segment(rows);
    const Threshold threshold = threshold_of(rows, segment.row, histograms, PASSES);
    const uint32_t num_ties = threshold.ties;
    uint32_t before[2];
    count_before(rows, segment, tallies, before);
    int64_t* out = columns + rows.starts[segment.row];
    for (int64_t tile = segment.begin; tile < segment.end; tile += TILE) {
        const Keys keys = load(segment, tile);
        uint32_t counts[VECTORS], totals[VECTORS];  // above in the low half, ties in the high half: at most STRIPE each
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            counts[v] = 0;
            for (int i = 0; i < VECTOR; ++i)
                if (i < keys.present[v])
                    counts[v] += (keys.key[v][i] > threshold.key) + ((keys.key[v][i] == threshold.key) << 16);
        }
        exclusive_scan(counts, totals);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            uint32_t above = before[0] + (counts[v] & 0xffff), ties = before[1] + (counts[v] >> 16);
            for (int i = 0; i < VECTOR; ++i) {
                if (i >= keys.present[v]) continue;
                const bool is_above = keys.key[v][i] > threshold.key, is_tie = keys.key[v][i] == threshold.key;
                if (is_above || (is_tie && ties < num_ties))
                    out[above + (ties < num_ties ? ties : num_ties)] = tile + v * STRIPE + threadIdx.x * VECTOR + i;
                above += is_above;
                ties += is_tie;
            }
            before[0] += totals[v] & 0xffff;
            before[1] += totals[v] >> 16;
        }
    }
}

int64_t num_segments(int64_t num_columns, int64_t segment_size) {
    return (num_columns + segment_size - 1) / segment_size;
}

int64_t histogram_bytes(int64_t num_rows) { return PASSES * num_rows * BINS * static_cast<int64_t>(sizeof(int32_t)); }

}  // namespace

// Bytes of scratch memory that fastkv_select needs.
extern "C" int64_t fastkv_select_scratch(int64_t num_rows, int64_t num_columns, int64_t segment_size) {
    return histogram_bytes(num_rows) + 2 * num_rows * num_segments(num_columns, segment_size) * static_cast<int64_t>(sizeof(uint32_t));
}

// Pointers are to device memory, see Rows; num_columns below 2^31, segment_size whole tiles, scratch 16-byte aligned.
extern "C" int fastkv_select(const float* scores, int64_t stride, const int64_t* num_kept, const int64_t* lengths,
                             const int64_t* starts, int64_t num_rows, int64_t num_columns, int64_t segment_size,
                             void* scratch, int64_t* columns, cudaStream_t stream) {
    if (segment_size <= 0 || segment_size % TILE) return cudaErrorInvalidValue;
    const Rows rows = {scores, stride,   num_kept, lengths,
                       starts, num_rows, num_segments(num_columns, segment_size), segment_size};
    const int64_t blocks = num_rows * rows.num_segments;
    int32_t* histograms = static_cast<int32_t*>(scratch);
    uint32_t* tallies = reinterpret_cast<uint32_t*>(histograms + PASSES * num_rows * BINS);
    int code = cudaMemsetAsync(scratch, 0, histogram_bytes(num_rows), stream);
    if (!code) code = launch(stream, blocks, histogram_kernel<0>, rows, histograms);
    if (!code) code = launch(stream, blocks, histogram_kernel<1>, rows, histograms);
    if (!code) code = launch(stream, blocks, histogram_kernel<2>, rows, histograms);
    if (!code) code = launch(stream, blocks, count_kernel, rows, histograms, tallies);
    if (!code) code = launch(stream, blocks, scatter_kernel, rows, histograms, tallies, columns);
    return code;
}
