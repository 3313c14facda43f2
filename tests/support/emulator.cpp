// The kernels of sparsify/runtime/cuda/kernels for a host, and one function that launches any of them.
#define SPARSIFY_EMULATOR
#include "kernels.cu"

void emulator::run_kernel() { kernel(*(const Arguments*)arguments); }

// Runs every block, one after the other. 0, or 1 with the failure in `error`.
extern "C" int emulate(void* function, const int* grid, int threads, int cluster, u64 shared_bytes, const void* arguments,
                       const void* const* buffers, const u64* bytes, const int* writable, int count, int backwards,
                       char* error, int error_bytes) {
  using namespace emulator;
  failure[0] = 0;
  kernel = (Kernel)function;
  emulator::arguments = arguments;
  emulator::buffers.clear();
  for (int i = 0; i < count; i++) emulator::buffers.push_back({(const unsigned char*)buffers[i], bytes[i], writable[i] != 0});
  grid_x = grid[0];
  if (cluster < 1 || threads % 32 || grid[2] % cluster) {
    snprintf(error, error_bytes, "%d blocks in clusters of %d, of %d threads", grid[2], cluster, threads);
    return 1;
  }
  for (at_z = 0; at_z < grid[2]; at_z += cluster)
    for (at_y = 0; at_y < grid[1]; at_y++)
      for (at_x = 0; at_x < grid[0]; at_x++)
        if (!run_cluster(threads, cluster, shared_bytes, backwards != 0)) {
          snprintf(error, error_bytes, "%s", failure);
          return 1;
        }
  return 0;
}

// The calls of the CUDA driver that sparsify/runtime/cuda/driver.py makes, over the emulator. Every address counts as a buffer.
#include <dlfcn.h>

static void* own_library() {
  Dl_info info;
  dladdr((void*)&own_library, &info);
  return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}
static std::map<void*, unsigned> allowed_shared;
static int context = 0, early_launches = 0;

extern "C" int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)image;
  return 0;
}
extern "C" int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module ? dlsym(own_library(), name) : nullptr;
  return *function ? 0 : 500;
}
extern "C" int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute == 8 && value > 0 && value <= 227 << 10) allowed_shared[function] = value;
  else if (attribute != 9 || value < 0 || value > 100) return 1;
  return 0;
}
// As cuda.h has them.
struct Attribute { int id, pad; unsigned value[16]; };
struct Configuration {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};
extern "C" int cuLaunchKernelEx(const Configuration* launch, void* function, void** parameters, void** extra) {
  if (!context) return 201;
  const unsigned *g = launch->grid, *b = launch->block;
  if (b[1] != 1 || b[2] != 1 || extra || launch->stream != (void*)77 || b[0] > 1024 || !g[0] || !g[1] || !g[2]) return 1;
  const auto allowed = allowed_shared.find(function);
  if (launch->shared > (allowed == allowed_shared.end() ? 48u << 10 : allowed->second)) return 1;
  int cluster = 1;
  for (unsigned i = 0; i < launch->count; i++) {
    const Attribute& attribute = launch->attributes[i];
    if (attribute.id == 4 && attribute.value[0] == 1 && attribute.value[1] == 1) cluster = attribute.value[2];
    else if (attribute.id == 6 && attribute.value[0] == 1) early_launches++;
    else return 1;
  }
  if (cluster > 8) return 912;
  const int grid[3] = {(int)g[0], (int)g[1], (int)g[2]};
  const void* all = nullptr;
  const u64 bytes = ~0ull;
  const int writable = 1;
  char error[256];
  return emulate(function, grid, b[0], cluster, launch->shared, parameters[0], &all, &bytes, &writable, 1, 0, error,
                 sizeof error) ? 700 : 0;
}
extern "C" int launched_early() { return early_launches; }
extern "C" int cuDevicePrimaryCtxRetain(void** made, int device) {

  *made = (void*)(u64)(device + 5);
  return 0;
}
extern "C" int cuCtxSetCurrent(void* given) {
  context = given != nullptr;
  return 0;
}
extern "C" int cuGetErrorString(int code, const char** text) {
  *text = code == 500 ? "named symbol not found" : "an error";
  return 0;
}
