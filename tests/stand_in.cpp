// A device that is ordinary memory under another name, so that a machine without an accelerator can tell whether every
// tensor is where it must be: PyTorch's PrivateUse1 device, whose operators run the CPU's on the same memory and refuse
// what a real device refuses (tensors of the CPU among its own, the CPU's random generator).

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <cstdlib>

namespace {

using at::Tensor;
constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* at = bytes ? std::malloc(bytes) : nullptr;
    return {at, at, &std::free, c10::Device(KIND, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* old = storage.unsafeGetStorageImpl();
    auto larger = memory.allocate(bytes);
    std::memcpy(larger.get(), old->data(), std::min(bytes, old->nbytes()));
    old->set_data_ptr_noswap(std::move(larger));
    old->set_nbytes(bytes);
  }
};
Hooks hooks;

// Nothing runs beside the program, so there is nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device getDevice() const override { return {KIND, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return {KIND, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return only(); }
  c10::Stream getNewStream(c10::Device, int) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only(); }
  static c10::Stream only() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(KIND, 0)); }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};

bool ours(const Tensor& x) { return x.defined() && x.device().type() == KIND; }

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, dtype.value_or(at::kFloat));
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, dtype.value_or(at::kFloat), format);
}

// A CPU tensor over the same memory.
Tensor twin(const Tensor& x) {
  if (!ours(x)) return x;
  auto* start = static_cast<char*>(x.storage().mutable_data()) + x.storage_offset() * x.element_size();
  auto keep = [held = Tensor(x)](void*) mutable { held.reset(); };
  return at::from_blob(start, x.sizes(), x.strides(), keep, x.options().device(at::kCPU), std::nullopt);
}

Tensor moved(const Tensor& x) {
  if (!x.defined()) return x;
  auto strides = x.is_non_overlapping_and_dense() ? x.strides().vec() : x.contiguous().strides().vec();
  auto out = empty_strided(x.sizes(), strides, x.scalar_type(), {}, {}, {});
  twin(out).copy_(x);
  return out;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  twin(to).copy_(twin(from));
  return to;
}

at::Scalar local_scalar(const Tensor& x) { return twin(x).item(); }

const Tensor& resize_(const Tensor& x, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto wanted = C10_AS_INTARRAYREF_SLOW(size);
  auto bytes = static_cast<size_t>(c10::multiply_integers(wanted)) * x.element_size();
  if (x.storage().nbytes() < bytes) hooks.resizePrivateUse1Bytes(x.storage(), bytes);
  x.unsafeGetTensorImpl()->set_sizes_contiguous(wanted);
  return x;
}

Tensor& set_storage(Tensor& x, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return x;
}

// Every other operator: the CPU's, on twins.
void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.operator_name().name;
  const auto n = schema.arguments().size();
  std::vector<c10::IValue> given(stack->end() - n, stack->end()), used = given;
  std::vector<size_t> outs;
  bool own = false, foreign = false;
  auto twinned = [&](const Tensor& x) {
    own |= ours(x);
    foreign |= x.defined() && x.dim() > 0 && !ours(x);  // a single number of the CPU may stand anywhere
    return twin(x);
  };
  for (size_t i = 0; i < n; i++) {
    if (given[i].isTensor()) {
      const auto x = given[i].toTensor();
      used[i] = twinned(x);
      if (schema.arguments()[i].kwarg_only() && schema.arguments()[i].alias_info() && ours(x)) {  // out=
        used[i] = at::empty({0}, x.options().device(at::kCPU));
        outs.push_back(i);
      }
    } else if (given[i].isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor x : given[i].toTensorList()) list.push_back(twinned(x));
      used[i] = list;
    } else if (given[i].isOptionalTensorList()) {  // the places of an index, which may be the CPU's
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> x : given[i].toOptionalTensorList()) {
        TORCH_CHECK(own || !x.has_value() || !ours(*x), name, ": places on the device in a tensor of the CPU");
        list.push_back(x.has_value() ? std::optional<Tensor>(twin(*x)) : std::nullopt);
      }
      used[i] = list;
    } else if (given[i].isGenerator()) {
      TORCH_CHECK(given[i].toGenerator().device().type() == KIND, name, ": the CPU's random generator, not the device's");
    } else if (given[i].isDevice()) {
      used[i] = c10::Device(at::kCPU);
    }
  }
  TORCH_CHECK(!(own && foreign), name, ": expected all tensors to be on the same device, but some are on the CPU");
  torch::jit::drop(*stack, n);
  torch::jit::Stack result(used.begin(), used.end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &result);
  for (size_t i : outs) {
    const auto out = given[i].toTensor(), found = used[i].toTensor();
    if (found.sizes() != out.sizes()) resize_(out, found.sym_sizes(), std::nullopt);
    twin(out).copy_(found);
  }
  for (size_t r = 0; r < schema.returns().size(); r++) {
    const auto* alias = schema.returns()[r].alias_info();
    if (alias && alias->isWrite()) {  // in place: what was given
      for (size_t i = 0; i < n; i++) {
        const auto* other = schema.arguments()[i].alias_info();
        if (other && *other == *alias) {
          stack->push_back(given[i]);
          break;
        }
      }
    } else if (result[r].isTensor()) {
      stack->push_back(moved(result[r].toTensor()));
    } else if (result[r].isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor x : result[r].toTensorList()) list.push_back(moved(x));
      stack->push_back(list);
    } else {
      stack->push_back(result[r]);
    }
  }
}

}  // namespace

REGISTER_ALLOCATOR(KIND, &memory);
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("start", [] { at::RegisterPrivateUse1HooksInterface(&hooks); });
}
