// What a CPU build of torch lacks for tensors that say they are on CUDA: a device guard, and hooks that say CUDA is there.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

c10::DeviceIndex current = 0;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Guard() {}
  c10::DeviceIndex deviceCount() const noexcept override { return 8; }
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, current); }
  c10::Stream getStream(c10::Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
};

struct Hooks final : at::CUDAHooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 8; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  bool hasCUDA() const override { return true; }
};

Guard guard;
Hooks hooks;

}  // namespace

extern "C" void set_device(int index) { current = static_cast<c10::DeviceIndex>(index); }

extern "C" void install() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
  // The hooks of a build without CUDA are an object without data: its table of methods is all that there is to replace.
  *(void**)&const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks()) = *(void**)&hooks;
}
