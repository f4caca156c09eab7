// The stand-in for the process-group backend "hccl": device tensors only, carried by gloo.
// Device memory is host memory, so gloo gets a CPU view of the same bytes.
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

namespace fake_npu {

class Hccl final : public c10d::Backend {
  using Work = c10::intrusive_ptr<c10d::Work>;
  using T = at::Tensor;
  using Ts = std::vector<T>;
  using Tss = std::vector<Ts>;
  c10::intrusive_ptr<c10d::Backend> g_;

  T h(const T& t) const {
    TORCH_CHECK(t.is_privateuseone(), "Tensors must be NPU and dense (hccl got a tensor on ", t.device(), ")");
    TORCH_CHECK(t.is_contiguous(), "Tensors must be contiguous");
    const auto o = at::TensorOptions().dtype(t.scalar_type());
    if (t.numel() == 0) return at::empty(t.sizes(), o);
    return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [keep = t](void*) {}, o);
  }
  Ts h(const Ts& v) const { Ts r; for (auto& t : v) r.push_back(h(t)); return r; }
  Tss h(const Tss& v) const { Tss r; for (auto& t : v) r.push_back(h(t)); return r; }
  // A finished operation.  (gloo's own reduce-scatter work copies its result at
  // every wait(), so it must not be waited for again after we scaled the output.)
  struct Done final : c10d::Work {
    c10::intrusive_ptr<c10::ivalue::Future> f_;
    explicit Done(const Ts& outs)
        : f_(c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))) {
      f_->markCompleted(c10::IValue(outs));
      finish();
    }
    bool wait(std::chrono::milliseconds) override { return true; }
    c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return f_; }
  };
  // gloo has neither AVG nor PREMUL_SUM; HCCL sums and scales, and so do we.
  template <class O, class F> Work reduced(O opts, const Ts& outs, F call) {
    double scale = 1;
    if (opts.reduceOp == c10d::ReduceOp::AVG) {
      scale = 1.0 / getSize();
    } else if (opts.reduceOp == c10d::ReduceOp::PREMUL_SUM) {
      const auto* s = static_cast<c10d::NCCLPreMulSumSupplement*>(opts.reduceOp.supplement_.get());
      scale = s->tensor_factor.defined() ? s->tensor_factor.template item<double>() : s->double_factor;
    } else {
      return call(opts);
    }
    opts.reduceOp = c10d::ReduceOp::SUM;
    call(opts)->wait();
    for (auto t : outs) t.mul_(scale);
    return c10::make_intrusive<Done>(outs);
  }

 public:
  Hccl(c10::intrusive_ptr<c10d::Backend> g) : c10d::Backend(g->getRank(), g->getSize()), g_(std::move(g)) {}
  const std::string getBackendName() const override { return "hccl"; }

  Work broadcast(Ts& t, const c10d::BroadcastOptions& o) override { auto a = h(t); return g_->broadcast(a, o); }
  Work allreduce(Ts& t, const c10d::AllreduceOptions& o) override {
    auto a = h(t);
    return reduced(o, a, [&](auto& q) { return g_->allreduce(a, q); });
  }
  Work allreduce_coalesced(Ts& t, const c10d::AllreduceCoalescedOptions& o) override {
    auto a = h(t);
    return reduced(o, a, [&](auto& q) { return g_->allreduce_coalesced(a, q); });
  }
  Work reduce(Ts& t, const c10d::ReduceOptions& o) override {
    auto a = h(t);
    return reduced(o, a, [&](auto& q) { return g_->reduce(a, q); });
  }
  Work allgather(Tss& out, Ts& in, const c10d::AllgatherOptions& o) override {
    auto a = h(out); auto b = h(in);
    return g_->allgather(a, b, o);
  }
  Work _allgather_base(T& out, T& in, const c10d::AllgatherOptions& o) override {
    auto a = h(out), b = h(in);
    return g_->_allgather_base(a, b, o);
  }
  Work allgather_into_tensor_coalesced(Ts& out, Ts& in, const c10d::AllgatherOptions& o) override {
    auto a = h(out), b = h(in);
    return g_->allgather_into_tensor_coalesced(a, b, o);
  }
  Work gather(Tss& out, Ts& in, const c10d::GatherOptions& o) override {
    auto a = h(out); auto b = h(in);
    return g_->gather(a, b, o);
  }
  Work scatter(Ts& out, Tss& in, const c10d::ScatterOptions& o) override {
    auto a = h(out); auto b = h(in);
    return g_->scatter(a, b, o);
  }
  Work reduce_scatter(Ts& out, Tss& in, const c10d::ReduceScatterOptions& o) override {
    auto a = h(out); auto b = h(in);
    return reduced(o, a, [&](auto& q) { return g_->reduce_scatter(a, b, q); });
  }
  Work _reduce_scatter_base(T& out, T& in, const c10d::ReduceScatterOptions& o) override {
    auto a = h(out), b = h(in);
    return reduced(o, {a}, [&](auto& q) { return g_->_reduce_scatter_base(a, b, q); });
  }
  Work reduce_scatter_tensor_coalesced(Ts& out, Ts& in, const c10d::ReduceScatterOptions& o) override {
    auto a = h(out), b = h(in);
    return reduced(o, a, [&](auto& q) { return g_->reduce_scatter_tensor_coalesced(a, b, q); });
  }
  Work alltoall_base(T& out, T& in, std::vector<int64_t>& so, std::vector<int64_t>& si,
                     const c10d::AllToAllOptions& o) override {
    auto a = h(out), b = h(in);
    return g_->alltoall_base(a, b, so, si, o);
  }
  Work alltoall(Ts& out, Ts& in, const c10d::AllToAllOptions& o) override {
    auto a = h(out), b = h(in);
    return g_->alltoall(a, b, o);
  }
  Work send(Ts& t, int dst, int tag) override { auto a = h(t); return g_->send(a, dst, tag); }
  Work recv(Ts& t, int src, int tag) override { auto a = h(t); return g_->recv(a, src, tag); }
  Work recvAnysource(Ts& t, int tag) override { auto a = h(t); return g_->recvAnysource(a, tag); }
  Work barrier(const c10d::BarrierOptions&) override { return g_->barrier({}); }
  void setSequenceNumberForGroup() override { g_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return g_->getSequenceNumberForGroup(); }
};

void bind_hccl(pybind11::module_& m) {
  m.def("wrap_gloo", [](c10::intrusive_ptr<c10d::Backend> g) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Hccl>(std::move(g));
  });
}

}  // namespace fake_npu
