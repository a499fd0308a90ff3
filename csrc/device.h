// The device and the stream that a kernel is started on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#ifdef LLM2VEC_FAST_EMULATE

namespace llm2vec_fast {
inline bool on_device(const torch::stable::Tensor& t) { return t.is_cpu(); }
struct OnDevice {
  OnDevice(const char*, const torch::stable::Tensor&, bool) {}
  void* stream() const { return nullptr; }
};
}  // namespace llm2vec_fast

#else

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace llm2vec_fast {

inline bool on_device(const torch::stable::Tensor& t) { return t.is_cuda(); }

// Makes the tensor's device the current one, for torch until the end of the scope.
class OnDevice {
 public:
  OnDevice(const char* op, const torch::stable::Tensor& t, bool fp8)
      : guard_(t.get_device_index()), device_(t.get_device_index()) {
    // Our CUDA runtime is linked statically and is not torch's: it must be told as well.
    check(op, cudaSetDevice(device_));
    if (!fp8) return;
    int major = 0, minor = 0;
    check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    check(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
    if (10 * major + minor < 89) {
      throw std::runtime_error(std::string(op) + ": fp8 needs compute capability 8.9 or newer");
    }
  }

  // Looked up by name: linked to libtorch_cuda, we could not be loaded on CPU builds of torch.
  void* stream() const {
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const Getter getter = [] {
      void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* found =
          torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
      return reinterpret_cast<Getter>(found);
    }();
    void* stream = nullptr;
    if (getter == nullptr || getter(device_, &stream) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error("llm2vec_fast_cuda: this torch does not tell its CUDA stream");
    }
    return stream;
  }

 private:
  static void check(const char* op, cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
};

}  // namespace llm2vec_fast

#endif
