// A CUDA device whose memory is the host's, for a build of PyTorch without CUDA: a tensor on `cuda:0` is memory of this
// process, and an op on it is PyTorch's CPU kernel on the same memory. What belongs to a device stays apart: a tensor of
// the host beside one of the device raises, new memory is NaN, streams and events are told apart and everything that
// they do is written down (`races.py` reads it).
//
// It must be loaded before `import torch`, which asks for the hooks once.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "streams.h"

namespace {

using namespace host_gpu;

REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &allocator);
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// ---- tensors of the device as tensors of the host, and back

void drop(void* context) { delete static_cast<c10::Storage*>(context); }

at::Tensor made(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

c10::Storage host_storage(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  auto* owner = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), owner, &drop, c10::Device(c10::kCPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetDefaultCPUAllocator(), true);
}

c10::Storage device_storage(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  auto* owner = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), owner, &drop, c10::Device(c10::kCPU));
  return c10::Storage(
      c10::Storage::use_byte_size_t(), storage.nbytes(), on_device(std::move(data), storage.nbytes()), &allocator, true);
}

at::Tensor to_host(const at::Tensor& tensor) { return made(host_storage(tensor), c10::DispatchKey::CPU, tensor); }

at::Tensor to_device(const at::Tensor& tensor) {
  return made(device_storage(tensor), c10::DispatchKey::CUDA, tensor);
}

void write_down_access(bool writes, const at::Tensor& tensor, const std::string& name) {
  if (!logging || tensor.numel() == 0 || name.starts_with("c10d::")) return;  // `nccl.py` knows what those write
  int64_t span = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) span += (tensor.size(i) - 1) * tensor.stride(i);
  const auto first = reinterpret_cast<int64_t>(tensor.const_data_ptr());
  const auto last = first + span * static_cast<int64_t>(tensor.element_size());
  write_down(writes ? WRITE : READ, stream_now, first, last, name);
}

// ---- every op that PyTorch has for a CPU

const std::set<std::string> MIXED = {  // take tensors of the host beside those of the device
    "aten::copy_", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::_copy_from"};

struct Call {
  const c10::FunctionSchema& schema;
  std::string name;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // of the device, of the host
  std::vector<at::Tensor> written;

  explicit Call(const c10::OperatorHandle& op)
      : schema(op.schema()),
        name(schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name())) {}

  at::Tensor host(const at::Tensor& tensor, bool writes) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      TORCH_CHECK(
          tensor.dim() == 0 || MIXED.count(name) || tensor.device().type() != c10::kCPU,
          "Expected all tensors to be on the same device: ", name, " has one of ", tensor.sizes(), " on the CPU");
      return tensor;
    }
    write_down_access(writes, tensor, name);
    if (writes) written.push_back(tensor);
    for (const auto& [device, host] : pairs)
      if (device.is_same(tensor)) return host;
    for (const auto& [device, host] : pairs)  // views of one memory stay that
      if (device.storage().is_alias_of(tensor.storage()) && device.storage().data() == host.storage().data()) {
        pairs.emplace_back(tensor, made(host.storage(), c10::DispatchKey::CPU, tensor));
        return pairs.back().second;
      }
    pairs.emplace_back(tensor, to_host(tensor));
    return pairs.back().second;
  }

  at::Tensor device(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (const auto& [device, host] : pairs)
      if (host.is_same(tensor)) return device;
    for (const auto& [device, host] : pairs)
      if (host.storage().is_alias_of(tensor.storage()))
        return made(device.storage(), c10::DispatchKey::CUDA, tensor);
    auto out = to_device(tensor);
    write_down_access(true, out, name);
    return out;
  }

  c10::IValue converted(const c10::IValue& value, bool writes) {
    if (value.isTensor()) return host(value.toTensor(), writes);
    if (value.isDevice()) return value.toDevice().is_cuda() ? c10::IValue(c10::Device(c10::kCPU)) : value;
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(host(one, writes));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& one : value.toOptionalTensorVector())
        list.push_back(one ? std::optional<at::Tensor>(host(*one, writes)) : one);
      return list;
    }
    return value;
  }

  c10::IValue returned(const c10::IValue& value) {
    if (value.isTensor()) return device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(device(one));
      return list;
    }
    return value;
  }

  void take_over_new_sizes() {  // of results that were resized
    for (const auto& [device, host] : pairs) {
      if (host.storage().data() != device.storage().data())
        device.unsafeGetTensorImpl()->set_storage_keep_dtype(device_storage(host));
      if (host.sizes() != device.sizes() || host.strides() != device.strides())
        device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
};

void on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call call(op);
  const auto arguments = call.schema.arguments();
  const auto begin = stack->size() - arguments.size();
  bool device_only = true;
  const bool copies_out = call.name == "aten::copy_" && !(*stack)[begin].toTensor().is_cuda();
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[begin + i];
    const auto* alias = arguments[i].alias_info();
    if (value.isTensor() && value.toTensor().defined() && !value.toTensor().is_cuda()) device_only = false;
    value = call.converted(value, alias != nullptr && alias->isWrite());
  }
  if (call.name == "aten::_local_scalar_dense" || call.name == "aten::nonzero" || call.name == "aten::equal")
    host_takes_part("the host reads by " + call.name);
  if (call.name == "aten::copy_" && !device_only) host_takes_part("memory of the host is copied or written");
  if (call.name == "aten::index.Tensor" || call.name == "aten::index_put_" || call.name == "aten::_index_put_impl_")
    for (const auto& one : (*stack)[begin + 1].toOptionalTensorVector())
      if (one && one->scalar_type() == at::kBool) host_takes_part("the host counts what a mask selects");
  const bool blocks = call.name == "aten::_local_scalar_dense" || call.name == "aten::nonzero" ||
      (call.name == "aten::copy_" && !device_only && !(*stack)[begin + 2].toBool());
  if (copies_out && (*stack)[begin + 2].toBool() && (*stack)[begin].toTensor().is_contiguous()) {
    const at::Tensor to = (*stack)[begin].toTensor(), from = (*stack)[begin + 1].toTensor();
    torch::jit::drop(*stack, arguments.size());
    start_copy(to, from);
    torch::jit::push(*stack, to);
  } else {
    op.callBoxed(stack);
  }
  call.take_over_new_sizes();
  for (size_t i = stack->size() - call.schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = call.returned((*stack)[i]);
  if (blocks) {
    write_down(SYNCHRONIZE, stream_now, 0, 0, call.name);
    end_copies(next_event);
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

// ---- what makes tensors

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.guard_int(__FILE__, __LINE__));
  return self;
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  const auto first = reinterpret_cast<int64_t>(self.storage().data());
  write_down(RECORD_STREAM, stream.id(), first, first + static_cast<int64_t>(self.storage().nbytes()));
}

// Products of 16-bit operands with a wider result, which PyTorch has on GPUs alone.

at::Tensor mm_wide(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  return at::mm(a.to(at::kFloat), b.to(at::kFloat)).to(dtype);
}

at::Tensor bmm_wide(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  return at::bmm(a.to(at::kFloat), b.to(at::kFloat)).to(dtype);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("mm.dtype", &mm_wide);
  m.impl("bmm.dtype", &bmm_wide);
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("as_strided", &as_strided);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("record_stream", &record_stream);
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

// Collectives: gloo's, on the device's memory.

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name : {"allreduce_", "broadcast_", "_allgather_base_", "_reduce_scatter_base_", "alltoall_base_",
                           "reduce_", "send", "recv_", "barrier", "reduce_scatter_tensor_coalesced_",
                           "allgather_into_tensor_coalesced_", "allreduce_coalesced_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY(host_gpu, m) {
  m.def("host(Tensor(a) x) -> Tensor(a)", &to_host);
  m.def("device(Tensor(a) x) -> Tensor(a)", &to_device);
  m.def("access(Tensor x, bool writes, str name) -> ()", [](const at::Tensor& x, bool writes, std::string name) {
    write_down_access(writes, x, name);
  });
  m.def("log(bool on) -> ()", [](bool on) { logging = on; });
  m.def("capture(bool on) -> ()", [](bool on) { capturing = captures_here = on; });
  m.def("lines() -> (int[], str[])", []() {
    std::lock_guard<std::mutex> lock(log_mutex);
    return std::make_tuple(log_lines, log_names);
  });
  m.def("memory() -> (int, int)", []() { return std::make_tuple(bytes_now.load(), bytes_peak.load()); });
  m.def("reset_peak() -> ()", []() { bytes_peak = bytes_now.load(); });
}

} // namespace

// What follows stands in place of PyTorch's own functions: this library is loaded first, so its symbols win.

namespace at::accelerator {

std::optional<c10::DeviceType> getAccelerator(bool) { return DEVICE.type(); }

} // namespace at::accelerator

namespace at::detail {

struct Hooks : CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return NUM_DEVICES; }
  DeviceIndex getCurrentDevice() const override { return LOCAL_RANK; }
  DeviceIndex current_device() const override { return LOCAL_RANK; }
  Device getDeviceFromPtr(void*) const override { return DEVICE; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return createCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetDefaultCPUAllocator(); }
};

const CUDAHooksInterface& getCUDAHooks() {
  static const Hooks hooks;
  return hooks;
}

} // namespace at::detail
