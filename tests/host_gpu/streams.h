// What belongs to the device of `device.cpp`: its memory, streams and events, and the log of what they do.

#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace host_gpu {

inline int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

inline const int LOCAL_RANK = from_environment("LOCAL_RANK", 0);
inline const int NUM_DEVICES = from_environment("LOCAL_WORLD_SIZE", 1);
inline const c10::Device DEVICE(c10::DeviceType::CUDA, LOCAL_RANK);  // a process has its own
inline thread_local c10::StreamId stream_now = 0;
inline std::atomic<c10::StreamId> streams{1};
inline std::atomic<int64_t> bytes_now{0}, bytes_peak{0};

// ---- what is written down: one line a launch's tensor, an event, an allocation

enum Kind : int64_t { READ, WRITE, RECORD, WAIT, SYNCHRONIZE, ALLOCATE, FREE, RECORD_STREAM };

inline std::mutex log_mutex;
inline std::vector<int64_t> log_lines;  // kind, stream, first byte or event, last byte + 1, index into log_names
inline std::vector<std::string> log_names;
inline bool logging = false;

inline void write_down(Kind kind, int64_t stream, int64_t first, int64_t last, const std::string& name = "") {
  if (!logging) return;
  std::lock_guard<std::mutex> lock(log_mutex);
  log_lines.insert(log_lines.end(), {kind, stream, first, last, static_cast<int64_t>(log_names.size())});
  log_names.push_back(name);
}

// ---- while a graph is captured, whose launches are done again without the host

inline std::atomic<bool> capturing{false};
inline thread_local bool captures_here = false;  // other threads may ask for events, as in CUDA's thread-local mode

inline void host_takes_part(const std::string& how) {
  TORCH_CHECK(!capturing, how, " while a graph is captured");
}

// ---- copies to the host that nobody has waited for

struct Copy {
  at::Tensor to, from;
  int64_t before;  // the next event when it was started
};

inline std::mutex copies_mutex;
inline std::vector<Copy> copies;
inline std::atomic<int64_t> next_event{1};

inline void start_copy(const at::Tensor& to, const at::Tensor& from) {
  Copy copy{to, from.clone(), next_event.load()};
  std::memset(to.mutable_data_ptr(), 0xFF, to.nbytes());
  std::lock_guard<std::mutex> lock(copies_mutex);
  copies.push_back(std::move(copy));
}

inline void end_copies(int64_t event) {  // that were started before `event`
  std::vector<Copy> due;
  {
    std::lock_guard<std::mutex> lock(copies_mutex);
    const auto later = std::stable_partition(
        copies.begin(), copies.end(), [&](const Copy& copy) { return copy.before <= event; });
    due.assign(std::make_move_iterator(copies.begin()), std::make_move_iterator(later));
    copies.erase(copies.begin(), later);
  }
  for (const auto& copy : due) copy.to.copy_(copy.from);
}

// ---- memory

inline void release(void* context) {
  auto* memory = static_cast<std::pair<c10::DataPtr, size_t>*>(context);
  const auto first = reinterpret_cast<int64_t>(memory->first.get());
  write_down(FREE, 0, first, first + static_cast<int64_t>(memory->second));
  bytes_now -= static_cast<int64_t>(memory->second);
  delete memory;
}

inline c10::DataPtr on_device(c10::DataPtr host, size_t size) {
  auto* memory = new std::pair<c10::DataPtr, size_t>(std::move(host), size);
  void* data = memory->first.get();
  const auto now = bytes_now += static_cast<int64_t>(size);
  auto peak = bytes_peak.load();
  while (now > peak && !bytes_peak.compare_exchange_weak(peak, now)) {}
  const auto first = reinterpret_cast<int64_t>(data);
  write_down(ALLOCATE, stream_now, first, first + static_cast<int64_t>(size));
  return {data, memory, &release, DEVICE};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto host = c10::GetDefaultCPUAllocator()->allocate(size);
    if (size > 0) std::memset(host.get(), 0xFF, size);  // NaN in every format of floats
    return on_device(std::move(host), size);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};

inline DeviceAllocator allocator;

// ---- streams and events

inline c10::Stream stream_of(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, DEVICE, id); }

struct Event {
  std::atomic<int64_t> version{0};
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream_of(stream_now); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream_of(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream_of(streams++); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return getNewStream(DEVICE, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(std::exchange(stream_now, stream.id()));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return NUM_DEVICES; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event();
    auto* made = static_cast<Event*>(*event);
    made->version = next_event++;
    write_down(RECORD, stream.id(), made->version, 0);
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) write_down(WAIT, stream.id(), static_cast<Event*>(event)->version, 0);
  }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    host_takes_part("the host waits for an event");
    arrive(event);
  }
  void arrive(void* event) const {
    write_down(SYNCHRONIZE, -1, static_cast<Event*>(event)->version, 0);
    end_copies(static_cast<Event*>(event)->version);
  }
  bool queryEvent(void* event) const override {
    if (captures_here) host_takes_part("the host asks for an event");
    if (event != nullptr) arrive(event);
    return true;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override {
    host_takes_part("the host waits for a stream");
    write_down(SYNCHRONIZE, stream.id(), 0, 0);
    end_copies(next_event);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    host_takes_part("the host waits for the device");
    write_down(SYNCHRONIZE, -2, 0, 0);
    end_copies(next_event);
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }
};

} // namespace host_gpu
