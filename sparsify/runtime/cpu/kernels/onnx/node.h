// One node of a graph: its constants looked at once, when a session makes its kernels, and how it multiplies with them.
#pragma once
#include "named.h"

#include <new>
#include <thread>

extern "C" {
int sparsify_isa();
int sparsify_row_starts(int isa, const void* mask, i64 mask_bytes, i64 rows, i64 words, i64* starts);
int sparsify_check_24(const u8* meta, i64 count);
#define PRODUCT(name)                                                                                                      \
  int name(int isa, int kind, const void* values, i64 value_count, const void* codes, i64 code_bytes, const i64* starts,   \
           i64 start_count, const void* x, i64 x_count, const void* bias, i64 bias_count, void* y, i64 rows, i64 width,    \
           i64 few, int threads)
PRODUCT(sparsify_linear);
PRODUCT(sparsify_linear_float);
#undef PRODUCT
int sparsify_linear_few(int isa, int kind, int layout, int bits, i64 group, const void* values, i64 value_bytes,
                        const void* codes, i64 code_bytes, const i64* starts, i64 start_count, const void* scales,
                        i64 scale_count, const void* x, i64 x_count, const void* bias, i64 bias_count, void* y, i64 rows,
                        i64 width, i64 few, int exact, int threads);
}

namespace {

// As in sparsify/runtime/cpu/products.py and few.py, which say why.
const i64 FEW_24 = 16, FEW_BITMASK = 8, FEW_ACROSS = 14, MANY = 64, FEW_INTEGERS = 16;
// Few bits pad columns to a multiple of this, as few.h says.
const i64 UNIT_FEW = 128;

// ---- one node

struct Tensor {   // an input of a run; `at` is null where it was left out
  const void* at;
  Shape shape;
};

struct Kernel {
  const ort::Api& api;
  const Named& op;
  char node[200];
  int isa;
  i64 rows, width, columns;   // of one matrix; columns are padded
  i64 stack, group, exact;    // matrices; columns that share a scale, 0: all
  i64 value_count;            // of the whole stack
  i64* starts;                // of a bitmask's rows in its values; else null
  float* scales;              // widened, where x is wider than they are; else null
  i64 scale_count;            // of a row

  Kernel(const ort::Api& api, const Named& op)
      : api(api), op(op), node(""), isa(SCALAR), stack(1), group(0), exact(0), starts(nullptr), scales(nullptr), scale_count(0) {}
  ~Kernel() {
    delete[] starts;
    delete[] scales;
  }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  Teller tell() const { return {api, name_of(&op), node}; }
  i64 all_rows() const { return stack * rows; }
  // Numbers of full width, or bytes, that the values of a row take, where that is always the same.
  i64 row_values() const { return (op.layout == PAIRS ? columns / 2 : columns) * (op.bits ? op.bits : 8) / 8; }

  OrtStatus* open(const OrtKernelInfo* info);
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, i64* out) const;
  OrtStatus* sizes(const OrtKernelInfo* info);
  OrtStatus* constant(const OrtKernelInfo* info, Input input, const char* what, Shape& shape, const void** at);
  OrtStatus* open_codes(const OrtKernelInfo* info);
  OrtStatus* open_values(const OrtKernelInfo* info);
  OrtStatus* open_scales(const OrtKernelInfo* info);
  OrtStatus* input_of(const OrtKernelContext* context, Input input, Tensor& out) const;
  OrtStatus* run(OrtKernelContext* context) const;
  OrtStatus* by_expert(const OrtKernelContext* context, const Tensor given[], i64 tokens, void* y) const;
  OrtStatus* multiply(const OrtKernelContext* context, const Tensor given[], i64 matrix, const void* x, i64 tokens, void* y) const;
};

// The instruction set of this machine, or a lower one that the environment names; below zero where it names none.
int chosen_isa() {
  const char *asked = getenv("SPARSIFY_CPU_ISA"), *const names[] = {"scalar", "avx2", "avx512"};
  const int best = sparsify_isa();
  if (!asked) return best;
  for (int i = 0; i <= best; i++)
    if (!strcmp(asked, names[i])) return i;
  return -1;
}

OrtStatus* Kernel::constant(const OrtKernelInfo* info, Input input, const char* what, Shape& shape, const void** at) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  if (OrtStatus* bad = ort::KernelInfoGetConstantInput_tensor(api, info, (size_t)op.place(input), &is_constant, &value)) return bad;
  if (!is_constant || !value) return tell()(ort::NOT_IMPLEMENTED, "its %s are no constant of the graph", what);
  if (OrtStatus* bad = shape_of(api, value, shape)) return bad;
  void* data = nullptr;
  if (OrtStatus* bad = ort::GetTensorMutableData(api, const_cast<OrtValue*>(value), &data)) return bad;
  *at = data;
  return nullptr;
}

// onnxruntime's own word of one that is missing names no node.
OrtStatus* Kernel::attribute(const OrtKernelInfo* info, const char* name, i64* out) const {
  OrtStatus* bad = ort::KernelInfoGetAttribute_int64(api, info, name, out);
  if (!bad) return nullptr;
  ort::release(api, bad);
  return tell()(ort::INVALID_GRAPH, "no %s, which is an integer", name);
}

OrtStatus* Kernel::sizes(const OrtKernelInfo* info) {
  if (OrtStatus* bad = attribute(info, "in_features", &width)) return bad;
  if (OrtStatus* bad = attribute(info, "out_features", &rows)) return bad;
  const i64 unit = op.bits ? UNIT_FEW : UNIT;
  if (width < 1 || width > MOST_COLUMNS || rows < 1 || rows > ((i64)1 << 60) / (width + unit))
    return tell()(ort::INVALID_GRAPH, "in_features %lld and out_features %lld", (long long)width, (long long)rows);
  columns = (width + unit - 1) / unit * unit;
  if (op.experts) {
    if (OrtStatus* bad = attribute(info, "experts", &stack)) return bad;
    if (stack < 1 || stack > ((i64)1 << 60) / columns / rows) return tell()(ort::INVALID_GRAPH, "experts %lld", (long long)stack);
  }
  if (!op.bits) return nullptr;
  if (OrtStatus* bad = attribute(info, "exact", &exact)) return bad;
  if (OrtStatus* bad = attribute(info, "group", &group)) return bad;
  if (group != width && group != 32 && group != 64 && group != 128)
    return tell()(ort::INVALID_GRAPH, "a scale for %lld columns, and not for 32, 64, 128 or all %lld", (long long)group, (long long)width);
  if (group >= width) group = 0;
  scale_count = group ? (width + group - 1) / group : 1;
  return nullptr;
}

OrtStatus* Kernel::open_codes(const OrtKernelInfo* info) {
  Shape codes;
  const void* code = nullptr;
  if (OrtStatus* bad = constant(info, CODES, "codes", codes, &code)) return bad;
  if (codes.element != ort::UINT8 || !codes.is(all_rows(), columns / 8))
    return tell()(ort::INVALID_GRAPH, "its codes are no uint8 [%lld, %lld], which %lld x %lld weights have", (long long)all_rows(),
                  (long long)(columns / 8), (long long)all_rows(), (long long)width);
  if (op.layout == PAIRS)
    return sparsify_check_24((const u8*)code, all_rows() * (columns / 8))
               ? nullptr
               : tell()(ort::INVALID_GRAPH, "codes that are not two ascending positions: the file is damaged");
  starts = new (std::nothrow) i64[all_rows() + 1];
  if (!starts) return tell()(ort::FAIL, "no memory");
  if (op.bits != 4) {
    if (sparsify_row_starts(isa, code, all_rows() * (columns / 8), all_rows(), columns / 32, starts) == DONE) return nullptr;
    return tell()(ort::INVALID_GRAPH, "its mask is of another size than its shape says");
  }
  // Two values to a byte, those of each 64 columns in whole bytes.
  const u8* mask = (const u8*)code;
  starts[0] = 0;
  for (i64 row = 0; row < all_rows(); row++) {
    starts[row + 1] = starts[row];
    for (i64 block = 0; block < columns / 64; block++, mask += 8) {
      u64 bits;
      memcpy(&bits, mask, 8);
      starts[row + 1] += (__builtin_popcountll(bits) + 1) / 2;
    }
  }
  return nullptr;
}

OrtStatus* Kernel::open_values(const OrtKernelInfo* info) {
  Shape values;
  const void* number = nullptr;
  if (OrtStatus* bad = constant(info, VALUES, "values", values, &number)) return bad;
  const int element = op.bits == 8 ? ort::INT8 : op.bits == 4 ? ort::UINT8 : element_of(op.stored);
  if (values.element != element) return tell()(ort::INVALID_GRAPH, "its values are of another type than it says");
  if (op.layout != MASK) {
    value_count = all_rows() * row_values();
    if (values.is(all_rows(), row_values())) return nullptr;
    return tell()(ort::INVALID_GRAPH, "its values are not [%lld, %lld], which %lld x %lld weights have", (long long)all_rows(),
                  (long long)row_values(), (long long)all_rows(), (long long)width);
  }
  value_count = starts[all_rows()] + PADDING;
  if (values.is(value_count)) return nullptr;
  if (values.rank != 1) return tell()(ort::INVALID_GRAPH, "its values have %d dimensions, and those of a mask one", (int)values.rank);
  return tell()(ort::INVALID_GRAPH, "%lld values for a mask of %lld and %lld zeros after them: the file is damaged",
                (long long)values.dims[0], (long long)starts[all_rows()], (long long)PADDING);
}

OrtStatus* Kernel::open_scales(const OrtKernelInfo* info) {
  Shape shape;
  const void* at = nullptr;
  if (OrtStatus* bad = constant(info, SCALES, "scales", shape, &at)) return bad;
  if (shape.element != element_of(op.stored) || !shape.is(all_rows(), scale_count))
    return tell()(ort::INVALID_GRAPH, "its scales are not [%lld, %lld]", (long long)all_rows(), (long long)scale_count);
  if (op.given == op.stored) return nullptr;
  const i64 count = all_rows() * scale_count;
  scales = new (std::nothrow) float[count];
  if (!scales) return tell()(ort::FAIL, "no memory");
  for (i64 i = 0; i < count; i++) scales[i] = load(op.stored, at, i);
  return nullptr;
}

OrtStatus* Kernel::open(const OrtKernelInfo* info) {
  size_t size = sizeof node;
  if (OrtStatus* bad = ort::KernelInfo_GetNodeName(api, info, node, &size)) {   // it is too long
    ort::release(api, bad);
    node[0] = 0;
  }
  isa = chosen_isa();
  if (isa < 0) return tell()(ort::INVALID_ARGUMENT, "SPARSIFY_CPU_ISA names no instruction set of this machine");
  OrtStatus* bad = sizes(info);
  if (!bad && op.has(CODES)) bad = open_codes(info);
  if (!bad) bad = open_values(info);
  if (!bad && op.has(SCALES)) bad = open_scales(info);
  return bad;
}

// ---- a run

OrtStatus* Kernel::input_of(const OrtKernelContext* context, Input input, Tensor& out) const {
  out.at = nullptr;
  size_t count = 0;
  const OrtValue* value = nullptr;
  if (!op.has(input)) return nullptr;
  if (OrtStatus* bad = ort::KernelContext_GetInputCount(api, context, &count)) return bad;
  if ((size_t)op.place(input) < count)
    if (OrtStatus* bad = ort::KernelContext_GetInput(api, context, (size_t)op.place(input), &value)) return bad;
  if (!value) return input == BIAS ? nullptr : tell()(ort::INVALID_ARGUMENT, "input %d is missing", (int)op.place(input));
  if (OrtStatus* bad = shape_of(api, value, out.shape)) return bad;
  void* data = nullptr;
  if (OrtStatus* bad = ort::GetTensorMutableData(api, const_cast<OrtValue*>(value), &data)) return bad;
  static const u64 nothing = 0;
  out.at = data ? data : &nothing;   // a tensor without numbers may lie nowhere
  return nullptr;
}

// While it lives, the kernels that this thread calls share their rows among the session's threads.
struct Sharing {
  const ort::Api& api;
  const OrtKernelContext* context;
  OrtStatus* failed;
  Host own;

  Sharing(const ort::Api& api, const OrtKernelContext* context)
      : api(api), context(context), failed(nullptr), own{share, this} { host = &own; }
  ~Sharing() { host = nullptr; }
  Sharing(const Sharing&) = delete;
  Sharing& operator=(const Sharing&) = delete;

  static bool share(void* with, void (*work)(void*, size_t), size_t count, void* what) {
    Sharing& s = *(Sharing*)with;
    s.failed = ort::KernelContext_ParallelFor(s.api, s.context, work, count, (size_t)0, what);
    return !s.failed;
  }
};

// How many threads a session may have: what it has is not told. More pieces than threads cost little.
int most_threads() {
  static const int found = (int)std::thread::hardware_concurrency();
  return found < 2 ? 2 : found > 64 ? 64 : found;
}

// y [tokens, rows] of one matrix of the stack; x, y and bias are of the kind that was given.
OrtStatus* Kernel::multiply(const OrtKernelContext* context, const Tensor given[], i64 matrix, const void* x, i64 tokens, void* y) const {
  const bool across = op.layout == PAIRS && isa == AVX512;
  const i64 size = op.given == F32 ? 4 : 2, most = across ? tokens : MANY;
  // Values of few bits where tokens lie across no vectors: inputs are rounded, however many there are.
  const i64 few = op.bits ? across ? FEW_INTEGERS : MANY : op.layout == MASK ? FEW_BITMASK : across ? FEW_ACROSS : FEW_24;
  // A bitmask's starts say where its values lie; the others are as long for each matrix.
  const i64 count = starts ? value_count : rows * row_values(), step = op.bits ? 1 : op.stored == F32 ? 4 : 2;
  const u8* values = (const u8*)given[VALUES].at + (starts ? 0 : matrix * count * step);
  const i64* own = starts ? starts + matrix * rows : nullptr;
  const i64 code_bytes = op.has(CODES) ? rows * (columns / 8) : 0;
  const u8* codes = op.has(CODES) ? (const u8*)given[CODES].at + matrix * code_bytes : nullptr;
  const i64 first_scale = matrix * rows * scale_count;
  const void* factors = scales ? (const void*)(scales + first_scale) : op.bits ? (const u8*)given[SCALES].at + first_scale * size : nullptr;
  const i64 bias_count = given[BIAS].at ? rows : -1;
  Sharing sharing(api, context);
  for (i64 m = 0; m < tokens; m += most) {
    const i64 now = tokens - m < most ? tokens - m : most;
    const u8* in = (const u8*)x + m * width * size;
    u8* out = (u8*)y + m * rows * size;
    int answer;
    if (op.bits)
      answer = sparsify_linear_few(isa, op.given, op.layout, op.bits, group, values, count, codes, code_bytes, own,
                                   own ? rows + 1 : 0, factors, rows * scale_count, in, now * width, given[BIAS].at, bias_count,
                                   out, rows, width, few, exact != 0, most_threads());
    else
      answer = (op.given == op.stored ? sparsify_linear : sparsify_linear_float)(
          isa, op.stored, values, count, codes, code_bytes, own, own ? rows + 1 : 0, in, now * width, given[BIAS].at, bias_count,
          out, rows, width, few, most_threads());
    if (sharing.failed) return sharing.failed;
    if (answer != DONE)
      return tell()(ort::FAIL, answer == MEMORY ? "no memory" : answer == STARTS ? "a mask that changed" : "sizes that do not fit");
  }
  return nullptr;
}

// The tokens of each expert together: its weights are read once.
OrtStatus* Kernel::by_expert(const OrtKernelContext* context, const Tensor given[], i64 tokens, void* y) const {
  const Shape& shape = given[INDEX].shape;
  if (shape.element != ort::INT64 || !shape.is(tokens))
    return tell()(ort::INVALID_ARGUMENT, "its index is no int64 [%lld]", (long long)tokens);
  const i64* index = (const i64*)given[INDEX].at;
  for (i64 m = 0; m < tokens; m++)
    if (index[m] < 0 || index[m] >= stack)
      return tell()(ort::INVALID_ARGUMENT, "a token of expert %lld, and there are %lld", (long long)index[m], (long long)stack);
  const i64 size = op.given == F32 ? 4 : 2, x_bytes = width * size, y_bytes = rows * size;
  Buffer x(tokens * x_bytes), out(tokens * y_bytes), done(tokens);
  if (tokens && (!x.at || !out.at || !done.at)) return tell()(ort::FAIL, "no memory");
  if (tokens) memset(done.at, 0, tokens);
  for (i64 first = 0; first < tokens; first++) {
    if (done.at[first]) continue;
    i64 count = 0;
    for (i64 m = first; m < tokens; m++)
      if (index[m] == index[first]) memcpy(x.at + count++ * x_bytes, (const u8*)given[X].at + m * x_bytes, x_bytes);
    if (OrtStatus* bad = multiply(context, given, index[first], x.at, count, out.at)) return bad;
    count = 0;
    for (i64 m = first; m < tokens; m++)
      if (index[m] == index[first]) {
        memcpy((u8*)y + m * y_bytes, out.at + count++ * y_bytes, y_bytes);
        done.at[m] = 1;
      }
  }
  return nullptr;
}

OrtStatus* Kernel::run(OrtKernelContext* context) const {
  Tensor given[INPUTS] = {};
  for (int i = 0; i < INPUTS; i++)
    if (OrtStatus* bad = input_of(context, (Input)i, given[i])) return bad;
  const Shape &x = given[X].shape, &bias = given[BIAS].shape;
  if (x.rank != 2 || x.dims[1] != width || x.dims[0] < 0 || x.element != element_of(op.given))
    return tell()(ort::INVALID_ARGUMENT, "its input is no [tokens, %lld] of its type", (long long)width);
  if (given[BIAS].at && (!bias.is(rows) || bias.element != element_of(op.given)))
    return tell()(ort::INVALID_ARGUMENT, "its bias is not [%lld] in the type of its input", (long long)rows);
  const i64 tokens = x.dims[0], shape[2] = {tokens, rows};
  OrtValue* out = nullptr;
  if (OrtStatus* bad = ort::KernelContext_GetOutput(api, context, (size_t)0, shape, (size_t)2, &out)) return bad;
  void* y = nullptr;
  if (OrtStatus* bad = ort::GetTensorMutableData(api, out, &y)) return bad;
  return op.experts ? by_expert(context, given, tokens, y) : multiply(context, given, 0, given[X].at, tokens, y);
}

}   // namespace
