#include <cuda_runtime.h>

// Text of a code that another function of this library returned.
extern "C" const char* fastkv_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
