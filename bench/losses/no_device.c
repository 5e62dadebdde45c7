/* A CUDA driver without a device: every call succeeds, and launches do nothing. It has what Triton's launcher calls. */

#include <stdint.h>

enum { MAX_THREADS_PER_BLOCK = 0, MAJOR = 75, MINOR = 76, SHARED_MEMORY_OPTIN = 97 };

#define SUCCEEDS(name) int name(void) { return 0; }
#define GIVES_HANDLE(name) int name(void **handle) { *handle = (void *)1; return 0; }

SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuLaunchKernel)
SUCCEEDS(cuLaunchKernelEx)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuTensorMapEncodeTiled)
GIVES_HANDLE(cuCtxGetCurrent)
GIVES_HANDLE(cuDevicePrimaryCtxRetain)
GIVES_HANDLE(cuModuleGetFunction)
GIVES_HANDLE(cuModuleLoadData)

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device) { *device = 0; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(uint64_t *limit) { *limit = 0; return 0; }
int cuOccupancyMaxActiveClusters(int *clusters) { *clusters = 1; return 0; }
int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t address) { *data = address; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == MAJOR ? 9 : attribute == MINOR ? 0 : attribute == SHARED_MEMORY_OPTIN ? 232448 : 65536;
    return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return 0;
}

int cuGetErrorString(int error, const char **text) { *text = "no device"; return 0; }
