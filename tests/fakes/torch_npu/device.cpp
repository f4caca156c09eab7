// The stand-in device "npu": a PrivateUse1 backend that keeps its memory in host RAM,
// runs every operator on the CPU, and refuses what a card refuses: tensors of two
// devices in one operator, a CPU generator, more memory than there is.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/SDPBackend.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace fake_npu {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
constexpr auto kNPU = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 16;

int64_t env_int(const char* name, int64_t dflt) {
  const char* v = std::getenv(name);
  return v && *v ? std::atoll(v) : dflt;
}
int device_count() {  // FAKE_NPU_DEVICES chips, cut down by ASCEND_RT_VISIBLE_DEVICES
  int n = int(std::max<int64_t>(0, std::min<int64_t>(kMaxDevices, env_int("FAKE_NPU_DEVICES", 2))));
  if (const char* v = std::getenv("ASCEND_RT_VISIBLE_DEVICES")) {
    int visible = 0;
    for (const char* p = v; *p;) {
      char* end;
      const long id = std::strtol(p, &end, 10);
      if (end == p || id < 0) break;
      ++visible;
      p = *end == ',' ? end + 1 : end;
    }
    n = std::min(n, visible);
  }
  return n;
}
thread_local DeviceIndex g_current = 0;
void check_index(DeviceIndex i) {
  TORCH_CHECK(i >= 0 && i < device_count(), "Invalid NPU device id ", int(i),
              ": ", device_count(), " stand-in NPU(s) visible");
}

// ---------------------------------------------------------------- statistics
std::mutex g_stat_mutex;
std::map<std::string, int64_t> g_ops;     // operator -> calls
std::map<std::string, int64_t> g_copies;  // h2d, d2h, d2d, sync, synchronize, empty_cache -> calls
thread_local bool g_inside = false;  // in the fallback, whose own copies no card would make
void count(std::map<std::string, int64_t>& m, const std::string& k) {
  if (g_inside) return;
  std::lock_guard<std::mutex> l(g_stat_mutex);
  ++m[k];
}

// ----------------------------------------------------------------- allocator
struct Block { void* p; size_t n; DeviceIndex d; };
struct Alloc final : c10::DeviceAllocator {
  std::mutex mu;
  c10::CachingDeviceAllocator::DeviceStats st[kMaxDevices];
  size_t limit[kMaxDevices];
  Alloc() {
    for (auto& l : limit) l = env_int("FAKE_NPU_MEMORY", int64_t(64) << 30);
  }
  static size_t agg() { return size_t(c10::CachingAllocator::StatType::AGGREGATE); }
  c10::DataPtr allocate(size_t n) override {
    const auto d = g_current;
    std::lock_guard<std::mutex> l(mu);
    auto& s = st[d];
    if (n && size_t(s.allocated_bytes[agg()].current) + n > limit[d]) {
      s.num_ooms++;
      TORCH_CHECK_WITH(OutOfMemoryError, false,
          "NPU out of memory. NPU ", int(d), ": tried to allocate ", n,
          " bytes, ", limit[d] - s.allocated_bytes[agg()].current, " free (stand-in NPU)");
    }
    auto* b = new Block{nullptr, n, d};
    if (n) {
      TORCH_CHECK(posix_memalign(&b->p, 64, n) == 0, "host allocation failed");
      s.allocation[agg()].increase(1);
      s.active[agg()].increase(1);
      s.allocated_bytes[agg()].increase(n);
      s.requested_bytes[agg()].increase(n);
      s.active_bytes[agg()].increase(n);
      s.reserved_bytes[agg()].increase(n);
    }
    return {b->p, b, &Alloc::release, Device(kNPU, d)};
  }
  static Alloc& get() { static Alloc* a = new Alloc; return *a; }
  static void release(void* ctx) {
    auto* b = static_cast<Block*>(ctx);
    if (b->p) {
      auto& a = get();
      std::lock_guard<std::mutex> l(a.mu);
      auto& s = a.st[b->d];
      s.allocation[agg()].decrease(1);
      s.active[agg()].decrease(1);
      s.allocated_bytes[agg()].decrease(b->n);
      s.requested_bytes[agg()].decrease(b->n);
      s.active_bytes[agg()].decrease(b->n);
      s.reserved_bytes[agg()].decrease(b->n);
      std::free(b->p);
    }
    delete b;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dst, const void* src, size_t n) const override { std::memcpy(dst, src, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override { count(g_copies, "empty_cache"); }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex d) override {
    check_index(d);
    std::lock_guard<std::mutex> l(mu);
    return st[d];
  }
  template <class F> void each(DeviceIndex d, F f) {
    check_index(d);
    std::lock_guard<std::mutex> l(mu);
    for (auto* a : {&st[d].allocation, &st[d].active, &st[d].allocated_bytes,
                    &st[d].requested_bytes, &st[d].active_bytes, &st[d].reserved_bytes})
      for (auto& x : *a) f(x);
  }
  void resetAccumulatedStats(DeviceIndex d) override { each(d, [](auto& x) { x.reset_accumulated(); }); }
  void resetPeakStats(DeviceIndex d) override { each(d, [](auto& x) { x.reset_peak(); }); }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex d) override {
    check_index(d);
    std::lock_guard<std::mutex> l(mu);
    const size_t used = st[d].allocated_bytes[agg()].current;  // may exceed a limit that was lowered since
    return {limit[d] > used ? limit[d] - used : 0, limit[d]};
  }
};

// What torch-npu registers up to 2.12: an allocator without the statistics that
// torch.accelerator.memory_* need (they then fail), as a trainer must expect.
struct PlainAlloc final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override { return Alloc::get().allocate(n); }
  void copy_data(void* d, const void* s, size_t n) const override { std::memcpy(d, s, n); }
};

// "Pinned" memory: plain host memory whose addresses we remember.
struct PinnedAlloc final : c10::Allocator {
  static std::mutex mu;
  static std::map<const char*, size_t> live;
  struct Ctx { char* p; };
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (n) TORCH_CHECK(posix_memalign(&p, 64, n) == 0, "host allocation failed");
    auto* c = new Ctx{static_cast<char*>(p)};
    if (n) { std::lock_guard<std::mutex> l(mu); live[c->p] = n; }
    return {p, c, [](void* v) {
              auto* c = static_cast<Ctx*>(v);
              if (c->p) {
                { std::lock_guard<std::mutex> l(mu); live.erase(c->p); }
                std::free(c->p);
              }
              delete c;
            }, Device(DeviceType::CPU)};
  }
  void copy_data(void* d, const void* s, size_t n) const override { std::memcpy(d, s, n); }
  static bool owns(const void* p) {
    std::lock_guard<std::mutex> l(mu);
    auto it = live.upper_bound(static_cast<const char*>(p));
    if (it == live.begin()) return false;
    --it;
    return static_cast<const char*>(p) < it->first + it->second;
  }
  static PinnedAlloc& get() { static PinnedAlloc* a = new PinnedAlloc; return *a; }
};
std::mutex PinnedAlloc::mu;
std::map<const char*, size_t> PinnedAlloc::live;

// ----------------------------------------------------------------- generator
// Wraps a CPU generator: random operators run on the CPU with the wrapped one. As on a card, the numbers of a seed
// are not the CPU's of that seed.
constexpr uint64_t kOtherStream = 0x5DEECE66DULL;
struct Gen final : c10::GeneratorImpl {
  at::Generator cpu;
  explicit Gen(DeviceIndex d, uint64_t seed = c10::default_rng_seed_val)
      : c10::GeneratorImpl(Device(kNPU, d), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(at::detail::createCPUGenerator(seed ^ kOtherStream)) {}
  void set_current_seed(uint64_t s) override { cpu.set_current_seed(s ^ kOtherStream); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "NPU generator: the stand-in has no offset"); }
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed() ^ kOtherStream; }
  uint64_t seed() override { return cpu.seed() ^ kOtherStream; }
  void set_state(const c10::TensorImpl& s) override {
    static_cast<c10::GeneratorImpl*>(cpu.unsafeGetGeneratorImpl())->set_state(s);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return static_cast<c10::GeneratorImpl*>(cpu.unsafeGetGeneratorImpl())->get_state();
  }
  Gen* clone_impl() const override {
    auto* g = new Gen(device_.index());
    g->cpu = cpu.clone();
    return g;
  }
};
at::Generator& default_gen(DeviceIndex d) {
  static std::vector<at::Generator>* gens = [] {
    auto* v = new std::vector<at::Generator>;
    for (int i = 0; i < kMaxDevices; ++i) v->push_back(at::make_generator<Gen>(DeviceIndex(i)));
    return v;
  }();
  return (*gens)[d < 0 ? g_current : d];
}

// --------------------------------------------------------------------- guard
struct Event { std::chrono::steady_clock::time_point t; };
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kNPU; }
  Device exchangeDevice(Device d) const override {
    Device old(kNPU, g_current);
    setDevice(d);
    return old;
  }
  Device getDevice() const override { return Device(kNPU, g_current); }
  void setDevice(Device d) const override {
    if (d.index() < 0) return;
    check_index(d.index());
    g_current = d.index();
  }
  void uncheckedSetDevice(Device d) const noexcept override { if (d.index() >= 0) g_current = d.index(); }
  c10::Stream stream(Device d) const {
    return c10::Stream(c10::Stream::DEFAULT, Device(kNPU, d.index() < 0 ? g_current : d.index()));
  }
  c10::Stream getStream(Device d) const override { return stream(d); }
  c10::Stream getDefaultStream(Device d) const override { return stream(d); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return stream(d); }
  c10::Stream getNewStream(Device d, int) const override { return stream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return stream(s.device()); }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(device_count()); }
  void record(void** e, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (!*e) *e = new Event;
    static_cast<Event*>(*e)->t = std::chrono::steady_clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* e, const DeviceIndex) const noexcept override { delete static_cast<Event*>(e); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { count(g_copies, "synchronize"); }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override { count(g_copies, "synchronize"); }
  double elapsedTime(void* a, void* b, const DeviceIndex) const override {
    return std::chrono::duration<double, std::milli>(
               static_cast<Event*>(b)->t - static_cast<Event*>(a)->t).count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// --------------------------------------------------------------------- hooks
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DeviceIndex(device_count()); }
  void setCurrentDevice(DeviceIndex d) const override { check_index(d); g_current = d; }
  DeviceIndex getCurrentDevice() const override { return g_current; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { auto o = g_current; setCurrentDevice(d); return o; }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  const at::Generator& getDefaultGenerator(DeviceIndex d) const override { return default_gen(d); }
  at::Generator getNewGenerator(DeviceIndex d) const override {
    return at::make_generator<Gen>(d < 0 ? g_current : d);
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &PinnedAlloc::get(); }
  bool isPinnedPtr(const void* p) const override { return PinnedAlloc::owns(p); }
  at::Device getDeviceFromPtr(void*) const override { return Device(kNPU, g_current); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    c10::DeviceGuard g(s.device());
    auto fresh = Alloc::get().allocate(n);
    std::memcpy(fresh.get(), s.data(), std::min(n, s.nbytes()));
    s.set_data_ptr_noswap(std::move(fresh));
    s.set_nbytes(n);
  }
};

// ------------------------------------------------------------------ factories
Device resolve(std::optional<Device> d) {
  auto dev = d.value_or(Device(kNPU, g_current));
  return Device(kNPU, dev.index() < 0 ? g_current : dev.index());
}
at::Tensor empty_mf(c10::IntArrayRef size, std::optional<at::ScalarType> dt, std::optional<at::Layout>,
                    std::optional<Device> dev, std::optional<bool> pin, std::optional<at::MemoryFormat> mf) {
  TORCH_CHECK(!pin.value_or(false), "only CPU tensors can be pinned");
  c10::DeviceGuard g(resolve(dev));
  return at::detail::empty_generic(size, &Alloc::get(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dt), mf);
}
at::Tensor empty_st(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dt,
                    std::optional<at::Layout>, std::optional<Device> dev, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "only CPU tensors can be pinned");
  c10::DeviceGuard g(resolve(dev));
  return at::detail::empty_strided_generic(size, stride, &Alloc::get(),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dt));
}

// --------------------------------------------------------------------- copies
at::Tensor host_alias(const at::Tensor& t) {  // same bytes, seen as a CPU tensor
  if (!t.is_privateuseone()) return t;
  const auto opts = at::TensorOptions().dtype(t.scalar_type());
  if (t.numel() == 0) return at::empty(t.sizes(), opts);
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [keep = t](void*) {}, opts);
}
at::Tensor copy_from(const at::Tensor& src, const at::Tensor& dst, bool nb) {
  count(g_copies, src.is_privateuseone() ? (dst.is_privateuseone() ? "d2d" : "d2h") : "h2d");
  if (src.is_privateuseone() && !dst.is_privateuseone()) count(g_copies, "sync");
  auto d = host_alias(dst);
  auto s = host_alias(src);
  if (src.is_neg() != s.is_neg()) s = s.neg();
  if (src.is_conj() != s.is_conj()) s = s.conj();
  d.copy_(s, nb);
  return dst;
}
at::Tensor copy_from_and_resize(const at::Tensor& src, const at::Tensor& dst) {
  if (dst.sizes() != src.sizes()) at::native::resize_(dst, src.sizes(), std::nullopt);
  return copy_from(src, dst, false);
}
at::Scalar local_scalar(const at::Tensor& t) {
  count(g_copies, "sync");
  return host_alias(t).item();
}

// ---------------------------------------------------------------- the fallback
// Operators that accept CPU index tensors beside device data, as on CUDA/NPU.
const std::set<std::string>& index_ops() {
  static const std::set<std::string> s = {"aten::index", "aten::_index_put_impl_", "aten::index_put_",
                                          "aten::index_put", "aten::_unsafe_index", "aten::_unsafe_index_put"};
  return s;
}
// Operators in which even a 0-dim CPU tensor is refused by real devices.
const std::set<std::string>& strict_ops() {
  static const std::set<std::string> s = {"aten::cat", "aten::stack", "aten::mm", "aten::bmm", "aten::addmm",
      "aten::index_select", "aten::gather", "aten::scatter", "aten::scatter_", "aten::embedding",
      "aten::nll_loss_forward", "aten::_foreach_copy_"};
  return s;
}
// Operators whose result has a shape, or is a host value, that only the device knows: the host waits for it.
bool makes_the_host_wait(const std::string& name, const torch::jit::Stack& stack, size_t base) {
  static const std::set<std::string> s = {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};
  if (s.count(name)) return true;
  if (name.find("index_put") == std::string::npos) return false;
  for (size_t i = base; i < stack.size(); ++i)  // a mask as an index is turned into places, as by `nonzero`
    if (stack[i].isOptionalTensorList())
      for (const auto& t : stack[i].toOptionalTensorVector())
        if (t && t->defined() && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) return true;
  return false;
}
void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& schema = op.schema();
  const auto& name = schema.operator_name().name;
  const size_t n = schema.arguments().size(), base = stack.size() - n;
  std::optional<Device> seen;
  for (size_t i = 0; i < n && !seen; ++i) {  // the device of the first npu tensor
    auto look = [&](const at::Tensor& t) { if (!seen && t.defined() && t.is_privateuseone()) seen = t.device(); };
    const auto& v = stack[base + i];
    if (v.isTensor()) look(v.toTensor());
    else if (v.isTensorList()) for (const auto& t : v.toTensorVector()) look(t);
    else if (v.isOptionalTensorList()) for (const auto& t : v.toOptionalTensorVector()) if (t) look(*t);
  }
  if (!seen) return;
  auto verify = [&](const at::Tensor& t, const std::string& arg, bool is_index) {
    if (!t.defined() || t.device() == *seen) return;
    if (t.device().is_cpu()) {
      if (t.dim() == 0 && !strict_ops().count(name)) return;
      if (is_index && index_ops().count(name)) return;
    }
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ",
                *seen, " and ", t.device(), "! (when checking argument '", arg, "' of ", name, ")");
  };
  for (size_t i = 0; i < n; ++i) {
    const auto& v = stack[base + i];
    const auto& arg = schema.arguments()[i].name();
    if (v.isTensor()) verify(v.toTensor(), arg, false);
    else if (v.isTensorList()) for (const auto& t : v.toTensorVector()) verify(t, arg, false);
    else if (v.isOptionalTensorList())
      for (const auto& t : v.toOptionalTensorVector()) if (t) verify(*t, arg, true);
  }
}
void swap_generator(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& args = op.schema().arguments();
  const size_t n = args.size(), base = stack->size() - n;
  for (size_t i = 0; i < n; ++i) {
    auto t = args[i].type();
    if (auto o = t->cast<c10::OptionalType>()) t = o->getElementType();
    if (t->kind() != c10::TypeKind::GeneratorType) continue;
    auto& v = (*stack)[base + i];
    at::Generator g = v.isNone() ? default_gen(-1) : v.toGenerator();
    TORCH_CHECK(g.device().type() == kNPU, "Expected a 'npu' device type for generator but found '",
                g.device(), "' (", op.schema().operator_name().name, ")");
    v = static_cast<Gen*>(g.unsafeGetGeneratorImpl())->cpu;
  }
}
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, *stack);
  swap_generator(op, stack);
  const auto& on = op.schema().operator_name();
  count(g_ops, on.overload_name.empty() ? on.name : on.name + "." + on.overload_name);
  if (makes_the_host_wait(on.name, *stack, stack->size() - op.schema().arguments().size())) count(g_copies, "sync");
  struct Inside {
    bool before = g_inside;
    Inside() { g_inside = true; }
    ~Inside() { g_inside = before; }
  } inside;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

at::Tensor as_strided(const at::Tensor& s, c10::IntArrayRef sz, c10::IntArrayRef st, std::optional<int64_t> off) {
  return at::native::as_strided_tensorimpl(s, sz, st, off);
}
at::Tensor view(const at::Tensor& s, c10::IntArrayRef sz) { return at::native::view(s, sz); }
at::Tensor& set_storage(at::Tensor& r, at::Storage s, int64_t off, c10::IntArrayRef sz, c10::IntArrayRef st) {
  return at::native::set_storage_cpu_(r, s, off, sz, st);
}
at::Tensor& set_empty(at::Tensor& r) {
  c10::Storage s(c10::Storage::use_byte_size_t(), 0, Alloc::get().allocate(0), &Alloc::get(), true);
  return r.set_(s, 0, {0}, {});
}
// As in torch-npu: lets `module.to("npu")` move a parameter in place, so that tied weights stay tied.
bool may_take_the_data_of(const at::Tensor& a, const at::Tensor& b) {
  const auto plain = [](const at::Tensor& t) { return (t.is_cpu() || t.is_privateuseone()) && t.layout() == at::kStrided; };
  return a.key_set() == b.key_set() || (plain(a) && plain(b));
}
void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_mf);
  m.impl("empty_strided", empty_st);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("resize_", TORCH_FN(static_cast<const at::Tensor& (*)(const at::Tensor&, c10::IntArrayRef,
                              std::optional<at::MemoryFormat>)>(at::native::resize_)));
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", TORCH_FN(static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(at::native::set_)));
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_", set_empty);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("_has_compatible_shallow_copy_type", may_take_the_data_of);
  m.impl("record_stream", record_stream);
}

}  // namespace fake_npu

namespace at::native {
int64_t fake_npu_sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double,
                            bool, std::optional<double>, bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &fake_npu_sdp_choice)
}  // namespace at::native

namespace fake_npu { void bind_hccl(pybind11::module_&); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fake_npu;
  bind_hccl(m);
  static bool once = [] {
    if (env_int("FAKE_NPU_TORCH_ACCELERATOR_MEMORY", 0)) c10::SetAllocator(kNPU, &Alloc::get(), 1);
    else c10::SetAllocator(kNPU, new PlainAlloc, 1);
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    return true;
  }();
  (void)once;
  m.def("device_count", &device_count);
  m.def("current_device", [] { return int(g_current); });
  m.def("set_device", [](int d) { check_index(DeviceIndex(d)); g_current = DeviceIndex(d); });
  m.def("default_generator", [](int d) { return default_gen(DeviceIndex(d)); });
  m.def("set_memory_limit", [](int d, int64_t n) { check_index(DeviceIndex(d)); Alloc::get().limit[d] = n; });
  m.def("memory", [](int d) {  // allocated, peak, reserved, peak reserved, free, total
    auto st = Alloc::get().getDeviceStats(DeviceIndex(d));
    auto mi = Alloc::get().getMemoryInfo(DeviceIndex(d));
    auto& a = st.allocated_bytes[Alloc::agg()];
    auto& r = st.reserved_bytes[Alloc::agg()];
    return std::vector<int64_t>{a.current, a.peak, r.current, r.peak, int64_t(mi.first), int64_t(mi.second)};
  });
  m.def("reset_peak", [](int d) { Alloc::get().resetPeakStats(DeviceIndex(d)); });
  m.def("empty_cache", [] { Alloc::get().emptyCache({0, 0}); });
  m.def("op_counts", [] { std::lock_guard<std::mutex> l(g_stat_mutex); return g_ops; });
  m.def("transfer_counts", [] { std::lock_guard<std::mutex> l(g_stat_mutex); return g_copies; });
  m.def("reset_counts", [] { std::lock_guard<std::mutex> l(g_stat_mutex); g_ops.clear(); g_copies.clear(); });
}
