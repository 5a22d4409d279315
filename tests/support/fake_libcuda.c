// A CUDA driver that launches nothing and remembers what it was asked to launch.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;

enum { MOST = 256, ROOM = 227 << 10 };

static int count, sizes[MOST], launches;
static uint64_t values[MOST];
static Config last;

// How many parameters the next kernel takes, and the bytes of each.
void fake_expect(int n, const int *bytes) {
  count = n;
  memcpy(sizes, bytes, n * sizeof(int));
}

// What the last launch was given: the parameters, then the grid, the threads and all launches.
void fake_get(uint64_t *parameters, unsigned *rest) {
  memcpy(parameters, values, count * sizeof(uint64_t));
  memcpy(rest, last.grid, sizeof last.grid);
  rest[3] = last.block[0];
  rest[4] = launches;
}

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  last = *config;
  ++launches;
  for (int i = 0; i < count; ++i) {
    values[i] = 0;
    memcpy(&values[i], parameters[i], sizes[i] < 8 ? sizes[i] : 8);
  }
  return 0;
}

int cuPointerGetAttribute(void *out, int attribute, uint64_t pointer) {
  *(uint64_t *)out = pointer;
  return 0;
}

static int one(void **out) {
  *out = (void *)1;
  return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int error, const char **text) { return *text = "fake", 0; }
int cuGetErrorName(int error, const char **text) { return *text = "fake", 0; }
int cuCtxGetCurrent(void **context) { return one(context); }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxPushCurrent(void *context) { return 0; }
int cuCtxPopCurrent(void **context) { return one(context); }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = ROOM, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cuDeviceGet(int *device, int index) { return *device = 0, 0; }
int cuDeviceGetCount(int *number) { return *number = 1, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return one(context); }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = ROOM, 0; }
int cuModuleLoadData(void **module, const void *image) { return one(module); }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { return one(function); }
int cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = ROOM, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *number, void *function, void *config) {
  return *number = 1, 0;
}
// A descriptor that says where its tensor lies.
int cuTensorMapEncodeTiled(void **map, int type, unsigned rank, void *tensor) {
  *map = tensor;
  return 0;
}
int cuTensorMapEncodeIm2col(void) { return 0; }
