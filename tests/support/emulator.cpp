// The kernels of sparsify/runtime/cuda/kernels for a host, and one function that launches any of them.
#define SPARSIFY_EMULATOR
#include "kernels.cu"

void emulator::run_kernel() { kernel(*(const Arguments*)arguments); }

// Runs every block, one after the other. 0, or 1 with the failure in `error`.
extern "C" int emulate(void* function, const int* grid, int threads, u64 shared_bytes, const void* arguments,
                       const void* const* buffers, const u64* bytes, const int* writable, int count, int backwards,
                       char* error, int error_bytes) {
  using namespace emulator;
  failure[0] = 0;
  kernel = (Kernel)function;
  emulator::arguments = arguments;
  emulator::buffers.clear();
  for (int i = 0; i < count; i++) emulator::buffers.push_back({(const unsigned char*)buffers[i], bytes[i], writable[i] != 0});
  for (at_z = 0; at_z < grid[2]; at_z++)
    for (at_y = 0; at_y < grid[1]; at_y++)
      for (at_x = 0; at_x < grid[0]; at_x++)
        if (!run_block(threads, shared_bytes, backwards != 0)) {
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
static unsigned allowed_shared = 48 << 10;
static int context = 0;

extern "C" int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)image;
  return 0;
}
extern "C" int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module ? dlsym(own_library(), name) : nullptr;
  return *function ? 0 : 500;
}
extern "C" int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return 1;
  allowed_shared = value;
  return 0;
}
extern "C" int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by,
                              unsigned bz, unsigned shared, void* stream, void** parameters, void** extra) {
  if (!context) return 201;
  if (by != 1 || bz != 1 || extra || stream != (void*)77 || threads > 1024 || !x || !y || !z) return 1;
  if (shared > allowed_shared) return 1;
  const int grid[3] = {(int)x, (int)y, (int)z};
  const void* all = nullptr;
  const u64 bytes = ~0ull;
  const int writable = 1;
  char error[256];
  return emulate(function, grid, threads, shared, parameters[0], &all, &bytes, &writable, 1, 0, error, sizeof error) ? 700 : 0;
}
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
