// The entry point for a row of calls, which one set of threads goes through.
#include <string.h>

#include "crew.h"
#include "products.h"
#include "step_jobs.h"

using namespace ar;

namespace {

constexpr int64_t kMostCalls = 64;  // planned together
constexpr int64_t kMostThreads = 64;
constexpr int64_t kPiece = 1 << 17;  // multiplications of packed weights that are taken at once

enum CallKind { kProducts, kNorm, kAttend, kGate, kAdd, kTurn, kCopy };

struct Products {
  Job jobs[kSeveral];
  int64_t ends[kSeveral], count;  // strips of all weights up to and with each
  bool shares[kSeveral];          // the inputs of the first
};

struct Call {
  int64_t kind;
  union {
    Products products;
    NormJob norm;
    AttentionJob attention;
    PairJob pair;
    TurnJob turn;
    const ar_copy* copy;
  };
  int64_t scratch;       // bytes
  int64_t units, grain;  // of its work; the inputs of products are prepared before, in one piece
  int64_t work;          // about how many multiplications
};

int32_t open_products(const Kernels& k, const ar_call& given, Call* call) {
  const auto* weights = static_cast<const ar_weight*>(given.what);
  const auto* products = static_cast<const ar_product*>(given.with);
  if (given.count < 1 || given.count > kSeveral || weights == nullptr || products == nullptr)
    return kBadRange;
  Products& all = call->products;
  all.count = given.count;
  for (int64_t i = 0; i < given.count; ++i) {
    const ar_product &p = products[i], &q = products[0];
    Weights w;
    if (const int32_t bad = open(weights + i, &w)) return bad;
    if (w.count != 1) return kBadFormat;
    if (const int32_t bad = check(w.format, &p)) return bad;
    if (p.x != q.x || p.rows != q.rows || p.stride != q.stride || p.dtype != q.dtype || p.rows == 0)
      return kBadInput;
    all.jobs[i] = job_of(k, w.format, weights[i].blob, weights[i].blob + kHeader, &p);
    all.shares[i] = i && share_inputs(all.jobs[i], all.jobs[0]);
    if (!all.shares[i]) call->scratch += inputs_of(k, all.jobs[i]).all();
    call->units = all.ends[i] = call->units + w.format.strips;
  }
  const int64_t work = strip_work(all.jobs[0]);
  call->grain = ceil_div(kPiece, work);
  call->work = work * call->units;
  return kOk;
}

int32_t open_call(const Kernels& k, const ar_call& given, Call* call) {
  call->kind = given.kind;
  int32_t bad = kOk;
  int64_t work = 1;  // of a unit
  switch (given.kind) {
    case kProducts: return open_products(k, given, call);
    case kNorm: {
      const auto* norm = static_cast<const ar_norm_input*>(given.what);
      if ((bad = job_of(norm, &call->norm))) return bad;
      call->units = norm->rows;
      work = norm->columns;
      break;
    }
    case kAttend: {
      const auto* attention = static_cast<const ar_attention*>(given.what);
      if ((bad = job_of(attention, &call->attention))) return bad;
      const AttentionJob& job = call->attention;
      call->units = tasks(*attention, job);
      call->scratch = score_bytes(*attention);
      work = 2 * job.task_heads * job.length * job.width;
      break;
    }
    case kGate:
    case kAdd: {
      const auto* pair = static_cast<const ar_pair*>(given.what);
      if ((bad = job_of(pair, given.kind == kGate, &call->pair))) return bad;
      call->units = pair->count / 16;
      work = 16;
      break;
    }
    case kTurn: {
      const auto* turn = static_cast<const ar_turn*>(given.what);
      if ((bad = job_of(turn, &call->turn))) return bad;
      call->units = turn->sequences * turn->heads;
      work = turn->width;
      break;
    }
    case kCopy:
      call->copy = static_cast<const ar_copy*>(given.what);
      if ((bad = check(call->copy))) return bad;
      call->units = call->copy->sequences * call->copy->heads;
      work = call->copy->width;
      break;
    default: return kBadRange;
  }
  call->grain = ceil_div(kWorthAThread, work);
  call->work = work * call->units;
  return kOk;
}

void give_memory(const Kernels& k, uint8_t* memory, Call* call) {
  if (call->kind == kAttend) call->attention.scores = reinterpret_cast<float*>(memory);
  if (call->kind != kProducts) return;
  Products& all = call->products;
  for (int64_t i = 0; i < all.count; ++i) {
    Job& job = all.jobs[i];
    const Inputs inputs = inputs_of(k, job);
    place(inputs, all.shares[i] ? static_cast<uint8_t*>(all.jobs[0].packed) : memory, &job);
    if (!all.shares[i]) memory += inputs.all();
  }
}

void copy_heads(const ar_copy& c, int64_t begin, int64_t end) {
  const int64_t width = width_of(c.dtype);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t to = i / c.heads * c.y_stride[0] + i % c.heads * c.y_stride[1];
    memcpy(static_cast<uint8_t*>(c.y) + to * width,
           static_cast<const uint8_t*>(c.x) + i * c.width * width, size_t(c.width * width));
  }
}

void multiply_all(const Kernels& k, const Products& all, int64_t begin, int64_t end) {
  for (int64_t i = 0, first = 0; i < all.count; first = all.ends[i++]) {
    const int64_t from = begin > first ? begin : first;
    const int64_t to = end < all.ends[i] ? end : all.ends[i];
    if (from >= to) continue;
    fetch_first(all.jobs[i], from - first);
    multiply_strips(k, all.jobs[i], from - first, to - first);
  }
}

void prepare_inputs(const Kernels& k, const Products& all) {
  for (int64_t i = 0; i < all.count; ++i)
    if (!all.shares[i]) prepare_tiles(k, all.jobs[i], 0, input_tiles(all.jobs[i]));
}

void run_call(const Kernels& k, const Call& call, int64_t begin, int64_t end) {
  switch (call.kind) {
    case kProducts: return multiply_all(k, call.products, begin, end);
    case kNorm: return k.steps->norm(call.norm, begin, end);
    case kAttend: return k.steps->attend(call.attention, begin, end);
    case kGate:
    case kAdd: return k.steps->pair(call.pair, begin, end);
    case kTurn: return k.steps->turn(call.turn, begin, end);
    default: return copy_heads(*call.copy, begin, end);
  }
}

// What is done in a shift: one part by all threads, or several, one after the other, by one.
struct Part {
  const Call* call;
  bool prepares;
};

struct Plan {
  Call calls[kMostCalls];
  Part parts[2 * kMostCalls];
  Shift shifts[2 * kMostCalls];
  int64_t firsts[2 * kMostCalls + 1];  // parts of each shift
  int64_t parted, shifted;

  void add(const Call& call, bool prepares) {
    const bool together = prepares || call.units <= call.grain;
    const bool joins = together && shifted && shifts[shifted - 1].units == 1;
    parts[parted++] = Part{&call, prepares};
    if (!joins) {
      const Shift* last = shifted ? shifts + shifted - 1 : nullptr;
      const int64_t before = last ? last->before + last->units : 0;
      firsts[shifted] = parted - 1;
      shifts[shifted++] = Shift{together ? 1 : call.units, together ? 1 : call.grain, before};
    }
    firsts[shifted] = parted;
  }

  void work(const Kernels& k, int64_t shift, int64_t begin, int64_t end) const {
    const int64_t first = firsts[shift], last = firsts[shift + 1];
    if (shifts[shift].units > 1) return run_call(k, *parts[first].call, begin, end);
    for (int64_t i = first; i < last; ++i) {
      const Call& call = *parts[i].call;
      if (parts[i].prepares) prepare_inputs(k, call.products);
      else run_call(k, call, 0, call.units);
    }
  }
};

}  // namespace

namespace {

// Runs up to kMostCalls calls with a plan whose memory is given.
int32_t run_some(const ar_runtime* rt, const Kernels& k, const ar_call* calls, int64_t count,
                 int64_t threads, Plan* plan) {
  plan->parted = plan->shifted = 0;
  int64_t scratch = 0, work = 0;
  for (int64_t i = 0; i < count; ++i) {
    Call& call = plan->calls[i];
    call.scratch = call.units = 0;
    if (const int32_t bad = open_call(k, calls[i], &call)) return bad;
    call.scratch = ceil_div(call.scratch, 64) * 64;
    scratch += call.scratch;
    work += call.work;
    if (call.kind == kProducts) plan->add(call, true);
    if (call.units) plan->add(call, false);
  }
  const int64_t most = work < 2 * kWorthAThread ? 1 : threads < kMostThreads ? threads : kMostThreads;
  const int64_t workers = most < 1 || rt->parallel == nullptr ? 1 : most;
  Scratch memory, sharing;
  uint8_t* at = static_cast<uint8_t*>(memory.get(scratch + 64));
  const int64_t shares = plan->shifted * workers * int64_t(sizeof(Share));
  Share* share = static_cast<Share*>(sharing.get(shares + 64));
  if (at == nullptr || share == nullptr) return kNoMemory;
  for (int64_t i = 0; i < count; at += plan->calls[i++].scratch)
    give_memory(k, at, plan->calls + i);
  Crew crew(plan->shifts, plan->shifted, workers, share);
  parallel(rt, workers, 1, [&](int64_t, int64_t) {
    crew.work([&](int64_t s, int64_t b, int64_t e) { plan->work(k, s, b, e); });
  });
  return kOk;
}

}  // namespace

int32_t ar_run(const ar_runtime* rt, const ar_call* calls, int64_t count, int64_t threads) {
  if (calls == nullptr || count < 0) return kBadRange;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  Scratch room;
  Plan* plan = static_cast<Plan*>(room.get(sizeof(Plan)));
  if (plan == nullptr) return kNoMemory;
  for (int64_t i = 0; i < count; i += kMostCalls) {
    const int64_t some = count - i < kMostCalls ? count - i : kMostCalls;
    if (const int32_t bad = run_some(rt, *k, calls + i, some, threads, plan)) return bad;
  }
  return kOk;
}
