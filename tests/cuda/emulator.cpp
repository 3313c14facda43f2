// The kernels of sparsify/cuda/kernels for a host, and one function that launches any of them.
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
