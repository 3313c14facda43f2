// Products with packed weights as operators of onnxruntime, in the domain `sparsify`: docs/onnx.md says what they are.
//
//     y[tokens, out_features] = Linear24(x[tokens, in_features], values, codes, bias?)
//     y[tokens, out_features] = LinearBitmask(x[tokens, in_features], values, codes, bias?)
//
// Values and codes are constants of the graph, laid out as docs/format.md says (the mask as bytes). They are looked at once,
// when a session makes its kernels; threads are the session's.
#include "interface.h"

#include "../calls.h"

#include <atomic>
#include <cstdio>
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
}

namespace {

// As in sparsify/runtime/cpu/products.py, which says why.
const i64 FEW_24 = 16, FEW_BITMASK = 8, FEW_ACROSS = 10, MANY = 64;
const int OPERATORS = 10, INPUTS = 4;
enum Input { X = 0, VALUES = 1, CODES = 2, BIAS = 3 };

struct Named : ort::Operator {
  const ort::Api* api;
  bool bitmask;
  int given, stored;   // Kinds: of x, bias and y; of the values
};

int element_of(int kind) { return kind == F32 ? ort::FLOAT : kind == F16 ? ort::FLOAT16 : ort::BFLOAT16; }
const Named& named(const ort::Operator* op) { return *static_cast<const Named*>(op); }
const char* name_of(const ort::Operator* op) { return named(op).bitmask ? "LinearBitmask" : "Linear24"; }

// ---- what may be wrong, said

struct Teller {   // `node` as the graph names it
  const ort::Api& api;
  const char *op, *node;

  template <class... A> OrtStatus* operator()(ort::Code code, const char* text, A... a) const {
    char what[300], all[600];
    snprintf(what, sizeof what, text, a...);
    snprintf(all, sizeof all, "sparsify.%s%s%s: %s", op, *node ? " " : "", node, what);
    return ort::status(api, code, all);
  }
};

struct Shape { size_t rank; i64 dims[8]; int element; };

// The type and shape of a tensor; a rank above 8 has no dims.
OrtStatus* shape_of(const ort::Api& api, const OrtTensorTypeAndShapeInfo* info, Shape& out) {
  out = {};
  if (OrtStatus* bad = ort::GetTensorElementType(api, info, &out.element)) return bad;
  if (OrtStatus* bad = ort::GetDimensionsCount(api, info, &out.rank)) return bad;
  return out.rank <= 8 ? ort::GetDimensions(api, info, out.dims, out.rank) : nullptr;
}

OrtStatus* shape_of(const ort::Api& api, const OrtValue* value, Shape& out) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* bad = ort::GetTensorTypeAndShape(api, value, &info)) return bad;
  OrtStatus* bad = shape_of(api, info, out);
  ort::release(api, info);
  return bad;
}

OrtStatus* data_of(const ort::Api& api, const OrtValue* value, void** out) {
  return ort::GetTensorMutableData(api, const_cast<OrtValue*>(value), out);
}

// ---- one node

struct Kernel {
  const ort::Api& api;
  const Named& op;
  char node[200];
  int isa;
  i64 rows, width, columns, value_count;
  i64* starts;   // of a bitmask's rows in its values; else null

  Kernel(const ort::Api& api, const Named& op) : api(api), op(op), node(""), isa(SCALAR), starts(nullptr) {}
  ~Kernel() { delete[] starts; }
  Teller tell() const { return {api, name_of(&op), node}; }
  i64 code_bytes() const { return rows * (columns / 8); }

  OrtStatus* open(const OrtKernelInfo* info);
  OrtStatus* constant(const OrtKernelInfo* info, size_t input, const char* what, Shape& shape, const void** at);
  OrtStatus* run(OrtKernelContext* context) const;
  OrtStatus* bias_of(const OrtKernelContext* context, const void** at, i64* count) const;
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

OrtStatus* Kernel::constant(const OrtKernelInfo* info, size_t input, const char* what, Shape& shape, const void** at) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  if (OrtStatus* bad = ort::KernelInfoGetConstantInput_tensor(api, info, input, &is_constant, &value)) return bad;
  if (!is_constant || !value) return tell()(ort::NOT_IMPLEMENTED, "its %s are no constant of the graph", what);
  if (OrtStatus* bad = shape_of(api, value, shape)) return bad;
  void* data = nullptr;
  if (OrtStatus* bad = data_of(api, value, &data)) return bad;
  *at = data;
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
  if (OrtStatus* bad = ort::KernelInfoGetAttribute_int64(api, info, "in_features", &width)) return bad;
  if (OrtStatus* bad = ort::KernelInfoGetAttribute_int64(api, info, "out_features", &rows)) return bad;
  if (width < 1 || width > MOST_COLUMNS || rows < 1 || rows > ((i64)1 << 60) / (width + UNIT))
    return tell()(ort::INVALID_GRAPH, "in_features %lld and out_features %lld", (long long)width, (long long)rows);
  columns = (width + UNIT - 1) / UNIT * UNIT;
  Shape values, codes;
  const void *number, *code;
  if (OrtStatus* bad = constant(info, CODES, "codes", codes, &code)) return bad;
  if (OrtStatus* bad = constant(info, VALUES, "values", values, &number)) return bad;
  if (codes.element != ort::UINT8 || codes.rank != 2 || codes.dims[0] != rows || codes.dims[1] != columns / 8)
    return tell()(ort::INVALID_GRAPH, "its codes are no uint8 [%lld, %lld], which %lld x %lld weights have", (long long)rows,
                  (long long)(columns / 8), (long long)rows, (long long)width);
  if (values.element != element_of(op.stored)) return tell()(ort::INVALID_GRAPH, "its values are of another type than it says");
  if (!op.bitmask) {
    if (values.rank != 2 || values.dims[0] != rows || values.dims[1] != columns / 2)
      return tell()(ort::INVALID_GRAPH, "its values are not [%lld, %lld], which %lld x %lld weights have", (long long)rows,
                    (long long)(columns / 2), (long long)rows, (long long)width);
    value_count = rows * (columns / 2);
    if (!sparsify_check_24((const u8*)code, code_bytes()))
      return tell()(ort::INVALID_GRAPH, "codes that are not two ascending positions: the file is damaged");
    return nullptr;
  }
  starts = new (std::nothrow) i64[rows + 1];
  if (!starts) return tell()(ort::FAIL, "no memory");
  if (sparsify_row_starts(isa, code, code_bytes(), rows, columns / 32, starts) != DONE)
    return tell()(ort::INVALID_GRAPH, "its mask is of another size than its shape says");
  value_count = starts[rows] + PADDING;
  if (values.rank != 1 || values.dims[0] != value_count)
    return tell()(ort::INVALID_GRAPH, "%lld values for a mask of %lld bits and %lld zeros after them: the file is damaged",
                  values.rank == 1 ? (long long)values.dims[0] : -1LL, (long long)starts[rows], (long long)PADDING);
  return nullptr;
}

OrtStatus* Kernel::bias_of(const OrtKernelContext* context, const void** at, i64* count) const {
  size_t inputs = 0;
  const OrtValue* bias = nullptr;
  if (OrtStatus* bad = ort::KernelContext_GetInputCount(api, context, &inputs)) return bad;
  if (inputs <= BIAS) return nullptr;
  if (OrtStatus* bad = ort::KernelContext_GetInput(api, context, BIAS, &bias)) return bad;
  if (!bias) return nullptr;
  Shape shape;
  if (OrtStatus* bad = shape_of(api, bias, shape)) return bad;
  if (shape.rank != 1 || shape.dims[0] != rows || shape.element != element_of(op.given))
    return tell()(ort::INVALID_ARGUMENT, "its bias is not [%lld] in the type of its input", (long long)rows);
  void* data = nullptr;
  if (OrtStatus* bad = data_of(api, bias, &data)) return bad;
  *at = data;
  *count = rows;
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

OrtStatus* Kernel::run(OrtKernelContext* context) const {
  const OrtValue* in[3] = {};
  void* data[3] = {};
  for (size_t i = 0; i < 3; i++) {
    if (OrtStatus* bad = ort::KernelContext_GetInput(api, context, i, &in[i])) return bad;
    if (!in[i]) return tell()(ort::INVALID_ARGUMENT, "input %d is missing", (int)i);
    if (OrtStatus* bad = data_of(api, in[i], &data[i])) return bad;
  }
  Shape x;
  if (OrtStatus* bad = shape_of(api, in[X], x)) return bad;
  if (x.rank != 2 || x.dims[1] != width || x.dims[0] < 0 || x.element != element_of(op.given))
    return tell()(ort::INVALID_ARGUMENT, "its input is no [tokens, %lld] of its type", (long long)width);
  const void* bias = nullptr;
  i64 bias_count = -1;
  if (OrtStatus* bad = bias_of(context, &bias, &bias_count)) return bad;
  const i64 tokens = x.dims[0], shape[2] = {tokens, rows};
  OrtValue* out = nullptr;
  if (OrtStatus* bad = ort::KernelContext_GetOutput(api, context, (size_t)0, shape, (size_t)2, &out)) return bad;
  void* y = nullptr;
  if (OrtStatus* bad = data_of(api, out, &y)) return bad;
  const bool across = !op.bitmask && isa == AVX512;
  const i64 size = op.given == F32 ? 4 : 2, most = across ? tokens : MANY;
  const i64 few = op.bitmask ? FEW_BITMASK : across ? FEW_ACROSS : FEW_24;
  Sharing sharing(api, context);
  for (i64 m = 0; m < tokens; m += most) {
    const i64 count = tokens - m < most ? tokens - m : most;
    auto product = op.given == op.stored ? sparsify_linear : sparsify_linear_float;
    const int answer = product(isa, op.stored, data[VALUES], value_count, data[CODES], code_bytes(), starts,
                               starts ? rows + 1 : 0, (const u8*)data[X] + m * width * size, count * width, bias, bias_count,
                               (u8*)y + m * rows * size, rows, width, few, most_threads());
    if (sharing.failed) return sharing.failed;
    if (answer != DONE)
      return tell()(ort::FAIL, answer == MEMORY ? "no memory" : answer == STARTS ? "a mask that changed" : "sizes that do not fit");
  }
  return nullptr;
}

// ---- what onnxruntime asks of an operator

OrtStatus* create(const ort::Operator* op, const ort::Api* api, const OrtKernelInfo* info, void** out) {
  Kernel* kernel = new (std::nothrow) Kernel(*api, named(op));
  if (!kernel) return ort::status(*api, ort::FAIL, "sparsify: no memory");
  if (OrtStatus* bad = kernel->open(info)) {
    delete kernel;
    return bad;
  }
  *out = kernel;
  return nullptr;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) { return ((const Kernel*)kernel)->run(context); }
void destroy(void* kernel) { delete (Kernel*)kernel; }

// [tokens, out_features], whatever the tokens are called. Of a size that is neither known nor named onnxruntime would take the
// -1 for the number that it is: it gets a name that no other has.
OrtStatus* infer(const ort::Operator* op, OrtShapeInferContext* context) {
  const ort::Api& api = *named(op).api;
  const OrtOpAttr* attribute = nullptr;
  OrtTensorTypeAndShapeInfo *x = nullptr, *y = nullptr;
  i64 dims[2] = {-1, 0};
  size_t read = 0;
  if (OrtStatus* bad = ort::ShapeInferContext_GetAttribute(api, context, "out_features", &attribute)) return bad;
  if (OrtStatus* bad = ort::ReadOpAttr(api, attribute, ort::INT_ATTRIBUTE, &dims[1], sizeof dims[1], &read)) return bad;
  if (OrtStatus* bad = ort::ShapeInferContext_GetInputTypeShape(api, context, (size_t)X, &x)) return bad;
  Shape shape;
  if (OrtStatus* bad = shape_of(api, x, shape)) return bad;
  static std::atomic<unsigned> unnamed{0};
  char name[40];
  snprintf(name, sizeof name, "sparsify_tokens_%u", unnamed++);
  const char *symbols[8] = {}, *tokens[2] = {"", ""};
  if (shape.rank == 2) {
    dims[0] = shape.dims[0];
    if (OrtStatus* bad = ort::GetSymbolicDimensions(api, x, symbols, (size_t)2)) return bad;
    if (symbols[0]) tokens[0] = symbols[0];
  }
  if (dims[0] < 0 && !*tokens[0]) tokens[0] = name;
  if (OrtStatus* bad = ort::CreateTensorTypeAndShapeInfo(api, &y)) return bad;
  // One operator is asked for all types that there are: the input says which.
  OrtStatus* bad = ort::SetTensorElementType(api, y, shape.element);
  if (!bad) bad = ort::SetDimensions(api, y, dims, (size_t)2);
  if (!bad) bad = ort::SetSymbolicDimensions(api, y, tokens, (size_t)2);
  if (!bad) bad = ort::ShapeInferContext_SetOutputTypeShape(api, context, (size_t)0, y);
  ort::release(api, y);
  return bad;
}

int input_type(const ort::Operator* op, size_t at) {
  return at == CODES ? ort::UINT8 : element_of(at == VALUES ? named(op).stored : named(op).given);
}

ort::Operator table() {
  ort::Operator t = {};
  t.version = ort::VERSION;
  t.GetName = name_of;
  t.GetExecutionProviderType = [](const ort::Operator*) -> const char* { return nullptr; };   // the CPU's
  t.GetInputType = input_type;
  t.GetInputTypeCount = [](const ort::Operator*) -> size_t { return INPUTS; };
  t.GetOutputType = [](const ort::Operator* op, size_t) { return element_of(named(op).given); };
  t.GetOutputTypeCount = [](const ort::Operator*) -> size_t { return 1; };
  t.KernelDestroy = destroy;
  t.GetInputCharacteristic = [](const ort::Operator*, size_t at) -> int { return at == BIAS ? ort::OPTIONAL : ort::REQUIRED; };
  t.GetOutputCharacteristic = [](const ort::Operator*, size_t) -> int { return ort::REQUIRED; };
  t.GetInputMemoryType = [](const ort::Operator*, size_t) { return 0; };
  t.GetVariadicInputMinArity = t.GetVariadicInputHomogeneity = [](const ort::Operator*) { return 0; };
  t.GetVariadicOutputMinArity = t.GetVariadicOutputHomogeneity = [](const ort::Operator*) { return 0; };
  t.CreateKernelV2 = create;
  t.KernelComputeV2 = compute;
  t.InferOutputShapeFn = infer;
  t.GetStartVersion = [](const ort::Operator*) { return 1; };
  t.GetEndVersion = [](const ort::Operator*) { return 1; };
  return t;
}

// The operators as one onnxruntime has them: several may be in a process, each with functions of its own. Sessions go on
// reading them, so they stay.
struct Domain {
  const ort::Api* api;
  Named operators[OPERATORS];
  OrtCustomOpDomain* made;
  Domain* next;

  OrtStatus* make() {
    const int kinds[5][2] = {{F32, F32}, {F32, BF16}, {F32, F16}, {F16, F16}, {BF16, BF16}};
    if (OrtStatus* bad = ort::CreateCustomOpDomain(*api, "sparsify", &made)) return bad;
    for (int i = 0; i < OPERATORS; i++) {
      static_cast<ort::Operator&>(operators[i]) = table();
      operators[i].api = api;
      operators[i].bitmask = i >= 5;
      operators[i].given = kinds[i % 5][0];
      operators[i].stored = kinds[i % 5][1];
      if (OrtStatus* bad = ort::CustomOpDomain_Add(*api, made, (const ort::Operator*)&operators[i])) return bad;
    }
    return nullptr;
  }
};

std::atomic<Domain*> domains{nullptr};

}   // namespace

extern "C" EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const ort::ApiBase* base) {
  const ort::Api* api = base->GetApi(ort::VERSION);
  if (!api) {
    char text[200];
    snprintf(text, sizeof text, "sparsify's operators need onnxruntime 1.%u or newer, and this is %s", ort::VERSION,
             base->GetVersionString());
    const ort::Api* first = base->GetApi(1);
    return first ? ort::status(*first, ort::NOT_IMPLEMENTED, text) : nullptr;
  }
  Domain* found = domains.load();
  while (found && found->api != api) found = found->next;
  if (!found) {
    found = new (std::nothrow) Domain{};
    if (!found) return ort::status(*api, ort::FAIL, "sparsify: no memory");
    found->api = api;
    if (OrtStatus* bad = found->make()) {
      delete found;
      return bad;
    }
    found->next = domains.load();
    while (!domains.compare_exchange_weak(found->next, found)) {}
  }
  return ort::AddCustomOpDomain(*api, options, found->made);
}
