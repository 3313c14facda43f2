// Products with packed weights as operators of onnxruntime, in the domain `sparsify`: docs/onnx.md says what they are.
//
//     y[tokens, out_features] = Linear24(x[tokens, in_features], values, codes, bias?)
//     y[tokens, out_features] = LinearBitmask(x, values, codes, bias?)
//     y[tokens, out_features] = Linear24Int8(x, values, codes, scales, bias?), LinearBitmaskInt8
//     y[tokens, out_features] = LinearInt8(x, values, scales, bias?), and the three with Int4
//     y[tokens, out_features] = Experts24(x, index[tokens], values, codes), and so on for all of them
//
// Values, codes and scales are constants of the graph, laid out as docs/format.md says (masks as bytes, stacks as rows one
// below the other). They are looked at once, when a session makes its kernels; threads are the session's.
#include "node.h"

#include <atomic>
#include <initializer_list>

namespace {

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
  const Named& n = named(op);
  switch (n.input(at)) {
    case INDEX: return ort::INT64;
    case CODES: return ort::UINT8;
    case SCALES: return element_of(n.stored);
    case VALUES: return n.bits == 8 ? ort::INT8 : n.bits == 4 ? ort::UINT8 : element_of(n.stored);
    default: return element_of(n.given);
  }
}

ort::Operator table() {
  ort::Operator t = {};
  t.version = ort::VERSION;
  t.GetName = name_of;
  t.GetExecutionProviderType = [](const ort::Operator*) -> const char* { return nullptr; };   // the CPU's
  t.GetInputType = input_type;
  t.GetInputTypeCount = [](const ort::Operator* op) -> size_t { return named(op).count(); };
  t.GetOutputType = [](const ort::Operator* op, size_t) { return element_of(named(op).given); };
  t.GetOutputTypeCount = [](const ort::Operator*) -> size_t { return 1; };
  t.KernelDestroy = destroy;
  t.GetInputCharacteristic = [](const ort::Operator* op, size_t at) -> int { return named(op).input(at) == BIAS ? ort::OPTIONAL : ort::REQUIRED; };
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

// Two kinds of products, of five types: two layouts of full width, three each of 8 and of 4 bits.
const int OPERATORS = 2 * 5 * (2 + 3 + 3);

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
    Named* next = operators;
    for (bool experts : {false, true})
      for (int bits : {0, 8, 4})
        for (int layout = PAIRS; layout <= (bits ? WHOLE : MASK); layout++)
          for (const int* kind : kinds) {
            static_cast<ort::Operator&>(*next) = table();
            next->api = api;
            next->layout = layout;
            next->bits = bits;
            next->experts = experts;
            next->given = kind[0];
            next->stored = kind[1];
            if (OrtStatus* bad = ort::CustomOpDomain_Add(*api, made, next++)) return bad;
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
