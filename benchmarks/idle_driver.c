// A stand-in for NVIDIA's driver, libcuda.so.1, that runs nothing: what Triton asks of it while it loads and launches
// kernels. It refuses what the real one would, and keeps what the last launch was given.
#include "cuda.h"
#include <stdint.h>
#include <string.h>

#define MOST 64  // parameters of a kernel

long launches;           // so far
int widths[MOST], n;     // bytes of each parameter of the expected kernel, as `idle.py` tells
long expected;
unsigned char given[4096];  // the last launch: grid, block, shared memory, function, stream, attributes, parameters
int given_bytes;
static CUcontext context;
static uintptr_t functions;

CUresult cuGetErrorString(CUresult error, const char **text) { *text = "refused by the stand-in"; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int i) { *device = i; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *found) { *found = context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext next) { context = next; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice device) { *found = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { *size = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t size) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *binary) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  *f = (CUfunction)++functions;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {  // an H200's
  *value = which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
         : which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? 233472
         : which == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK ? 65536
         : which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132
         : which == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32
                                                  : 1;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr at) {
  *(CUdeviceptr *)value = at;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

// what CUDA's manual asks of a tensor map in tiles
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *at,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}, widest[] = {1 << 30, 32, 64, 128};
  if (rank != 2 || (uintptr_t)at % 16 || type > 12 || swizzle > 3) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; i++)
    if (!shape[i] || shape[i] > 1ull << 32 || !box[i] || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
  int row = box[0] * bytes[type];
  if (strides[0] % 16 || strides[0] >= 1ull << 40 || row % 16 || row > widest[swizzle]) return CUDA_ERROR_INVALID_VALUE;
  uint64_t told[] = {(uintptr_t)at, 0, shape[0], shape[1], strides[0], box[0], box[1], type, swizzle, promotion, fill};
  memset(map, 0, sizeof *map);
  memcpy(map, told, sizeof told);
  return CUDA_SUCCESS;
}

static void keep(const void *what, int bytes) {
  if (given_bytes + bytes > (int)sizeof given) return;
  memcpy(given + given_bytes, what, bytes);
  given_bytes += bytes;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  unsigned numbers[] = {c->gridDimX,  c->gridDimY,       c->gridDimZ, c->blockDimX,
                        c->blockDimY, c->sharedMemBytes, c->numAttrs, (unsigned)(uintptr_t)f,
                        (unsigned)(uintptr_t)c->hStream};
  if (!c->gridDimX || c->gridDimX > 2147483647 || c->gridDimY > 65535 || c->gridDimZ > 65535 || c->blockDimX > 1024 ||
      c->sharedMemBytes > 232448)
    return CUDA_ERROR_INVALID_VALUE;
  given_bytes = 0;
  keep(numbers, sizeof numbers);
  for (unsigned i = 0; i < c->numAttrs; i++) keep(&c->attrs[i].id, sizeof c->attrs[i].id);
  if ((long)f == expected)
    for (int i = 0; i < n; i++) keep(parameters[i], widths[i]);
  launches++;
  return CUDA_SUCCESS;
}
