// ring.h on the memory model of C++ instead of a machine's: a release/acquire view machine in place of std::atomic.
//
// Every atomic keeps all values that were ever stored to it. A load takes any of them that its thread's view still allows, so
// that it sees what a machine with weak memory, or an unlucky moment, could show. A thread's view says how far it has seen each
// atomic; a release store carries its thread's view along, an acquire load takes it over. Readers never write, so the writer
// runs first and every interleaving is one of the readers' choices. Writers may die between any two stores: what they would
// store after that is lost.
//
//   ring_model --reads 2000000 --seed 1        prints one line of JSON: reads, torn, older, ...
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include <time.h>
#include <unistd.h>

namespace model {

constexpr std::size_t kAtomics = 320;  // that are ever stored to
using View = std::array<std::uint16_t, kAtomics>;  // of each, the last store that is behind us

struct Store {
    std::uint64_t value;
    std::shared_ptr<const View> view;  // of a release store
};

struct Machine {
    std::unordered_map<const void*, std::size_t> numbers;
    std::array<std::vector<Store>, kAtomics> stores;  // the first of each is the 0 that it began with
    View view{};                                      // of the thread that runs
    std::mt19937_64 random{1};
    std::size_t stores_left = ~std::size_t{0};  // before the writer dies
    std::size_t stored = 0;
    std::uint64_t haste = 0;  // of 8 loads, about how many go on to a newer value

    static Machine& one() {
        static Machine machine;
        return machine;
    }

    void clear() {
        numbers.clear();
        for (std::vector<Store>& all : stores) all.assign(1, {0, nullptr});
        view = {};
        stores_left = ~std::size_t{0};
        stored = 0;
    }

    // Sees the last value of everything: a lock has passed from one thread to another.
    void see_all() {
        for (std::size_t i = 0; i < kAtomics; ++i) view[i] = static_cast<std::uint16_t>(stores[i].size() - 1);
    }

    // A thread that knows nothing but, perhaps, one value of one atomic.
    void start(const void* atomic) {
        view = {};
        const std::size_t i = number(atomic);
        view[i] = static_cast<std::uint16_t>(random() % stores[i].size());
    }

    std::size_t number(const void* atomic) {
        const std::size_t next = numbers.size();
        const std::size_t found = numbers.emplace(atomic, next).first->second;
        if (found >= kAtomics) std::abort();
        return found;
    }

    void store(const void* atomic, std::uint64_t value, std::memory_order order) {
        if (stores_left == 0) return;
        --stores_left;
        ++stored;
        const std::size_t i = number(atomic);
        view[i] = static_cast<std::uint16_t>(stores[i].size());
        const bool release = order == std::memory_order_release || order == std::memory_order_acq_rel ||
                             order == std::memory_order_seq_cst;
        stores[i].push_back({value, release ? std::make_shared<const View>(view) : nullptr});
    }

    std::uint64_t load(const void* atomic, std::memory_order order) {
        const std::size_t i = number(atomic);
        const std::vector<Store>& all = stores[i];
        // any from the last one seen; mostly that one, or a copy of many words would never be consistent by chance
        const std::uint64_t most = all.size() - 1 - view[i];
        const std::uint64_t on = random() % 8 >= haste ? 0 : random() % 8 ? 1 + random() % 3 : random() % (most + 1);
        view[i] = static_cast<std::uint16_t>(view[i] + std::min(on, most));
        const Store& taken = all[view[i]];
        if (order != std::memory_order_relaxed && taken.view)
            for (std::size_t k = 0; k < kAtomics; ++k) view[k] = std::max(view[k], (*taken.view)[k]);
        return taken.value;
    }
};

}  // namespace model

namespace std {
template <class T>
class modelled_atomic {
  public:
    static constexpr bool is_always_lock_free = true;
    void store(T value, memory_order order) noexcept {
        model::Machine::one().store(this, static_cast<uint64_t>(value), order);
    }
    T load(memory_order order) const noexcept { return static_cast<T>(model::Machine::one().load(this, order)); }
    bool compare_exchange_strong(T&, T, memory_order) noexcept { return false; }

  private:
    T unused_;
};
}  // namespace std

#define atomic modelled_atomic
#include <dit4dit/ring.h>
#undef atomic

#include "ring_case.h"

using namespace dit4dit;

namespace {

constexpr int kRows = 2, kChannels = 3;
constexpr int kReads = 6;  // of a reader: after more it has seen all there is

struct Tally {
    unsigned long long reads = 0, torn = 0, older = 0, whole = 0, tries_beyond = 0, contended = 0, gone = 0;
    unsigned long long ids_lost = 0, missed = 0;
    unsigned long long deaths = 0, feedback = 0, feedback_torn = 0;
};

void fresh(Segment& segment) {
    model::Machine::one().clear();
    segment.header.layout = ring_case::layout(kChannels);
}

// `content`: of which chunk, if not of its own id.
std::uint64_t publish_next(Segment& segment, std::uint64_t content = 0) {
    float values[kRows * kChannels];
    // what lies under the head is the writer's own: it sees the last value
    model::Machine::one().see_all();
    const std::uint64_t id = head(segment) + 1;
    if (content == 0) content = id;
    publish(segment, ring_case::chunk(content, kRows, kChannels, values), ring_case::published(content));
    return id;
}

// A reader that begins anywhere in the story and reads a few times.
void read_story(const Segment& segment, std::uint64_t chunks, int reads, Tally& tally) {
    model::Machine& machine = model::Machine::one();
    machine.start(&segment.header.stamps.head);
    HeldChunk held;
    std::uint64_t last = 0;
    for (int i = 0; i < reads; ++i) {
        machine.haste = machine.random() % 4;
        const std::uint64_t before = head(segment);
        ++tally.reads;
        if (machine.random() % 2) {  // the oldest that may still be there, or one that is not
            const std::uint64_t behind = machine.random() % (kSlots + 2);
            const std::uint64_t id = before > behind ? before - behind : before + 1;
            const std::uint64_t wanted = machine.random() % 4 ? id : before + 1;
            const bool copied = copy(segment, wanted, held);
            tally.gone += !copied;
            tally.torn += copied && (held.id != wanted || !ring_case::whole(held, kRows, kChannels, 0, kRows));
            tally.whole += copied;
            continue;
        }
        const Read read = copy_newest(segment, held);
        tally.tries_beyond += read.tries < 1 || read.tries > 4;
        tally.contended += read.found == Found::contended;
        if (read.found != Found::whole) continue;
        ++tally.whole;
        tally.torn += held.id > chunks || !ring_case::whole(held, kRows, kChannels, 0, kRows);
        tally.older += held.id < before || held.id < last;
        last = held.id;
    }
}

// Chunks of one writer.
void one_writer(Segment& segment, int chunks, int reads, Tally& tally) {
    model::Machine& machine = model::Machine::one();
    fresh(segment);
    for (int i = 0; i < chunks; ++i) publish_next(segment);
    for (int i = 0; i < reads; i += kReads) read_story(segment, static_cast<std::uint64_t>(chunks), kReads, tally);
    // and by the marks alone, of readers that do not know the head
    HeldChunk held;
    for (int i = 0; i < reads; ++i) {
        const std::uint64_t id = 1 + machine.random() % static_cast<std::uint64_t>(chunks);
        machine.start(&segment.slot[(id - 1) % kSlots].sequence);
        machine.haste = machine.random() % 4;
        const bool copied = copy_rows(segment, id, 0, kRows, held);
        ++tally.reads;
        tally.whole += copied;
        tally.torn += copied && (held.id != id || !ring_case::whole(held, kRows, kChannels, 0, kRows));
    }
}

// Before a slot is used again, every chunk up to the head that a reader has seen is there at the first try.
void nothing_overwritten(Segment& segment, int reads, Tally& tally) {
    model::Machine& machine = model::Machine::one();
    fresh(segment);
    for (int i = 0; i < kSlots; ++i) publish_next(segment);
    HeldChunk held;
    for (int i = 0; i < reads; ++i) {
        if (i % kReads == 0) machine.start(&segment.header.stamps.head);
        machine.haste = machine.random() % 4;
        const std::uint64_t before = head(segment);
        const Read read = copy_newest(segment, held);
        tally.missed += read.tries != 1 || read.found != (held.id ? Found::whole : Found::none) || held.id < before;
        if (before) tally.missed += !copy(segment, 1 + machine.random() % before, held);
    }
}

// A writer that dies after `stores` of the `all` stores of its last chunk, and a successor that goes on. Unless it was counted,
// nobody ever sees what it has written of that chunk.
void dying_writer(Segment& segment, std::size_t stores, std::size_t all, int reads, Tally& tally) {
    model::Machine& machine = model::Machine::one();
    fresh(segment);
    const int before = kSlots + static_cast<int>(machine.random() % kSlots);
    for (int i = 0; i < before; ++i) publish_next(segment);
    machine.stores_left = stores;
    publish_next(segment, stores < all ? 5000 : 0);
    machine.stores_left = ~std::size_t{0};
    ++tally.deaths;
    machine.see_all();  // the lock has passed from one to the other
    const std::uint64_t counted = head(segment);
    for (int i = 1; i <= kSlots + 3; ++i) tally.ids_lost += publish_next(segment) != counted + static_cast<std::uint64_t>(i);
    for (int i = 0; i < reads; i += kReads) read_story(segment, counted + kSlots + 3, kReads, tally);
}

// The driver's feedback: tick n holds n everywhere. A driver dies inside a write, another goes on.
void feedback(Segment& segment, int reads, Tally& tally) {
    model::Machine& machine = model::Machine::one();
    fresh(segment);
    DriverFeedback sent;
    for (std::uint64_t n = 1; n <= 12; ++n) {
        machine.see_all();
        sent.driver = sent.tick = sent.chunk = n;
        sent.at_ns = static_cast<std::int64_t>(n);
        sent.row = static_cast<std::int32_t>(n);
        sent.status = static_cast<Status>(n % 6);
        for (double& value : sent.values) value = static_cast<double>(n);
        machine.stores_left = n % 4 == 0 ? machine.random() % 8 : ~std::size_t{0};
        write_feedback(segment, sent);
    }
    machine.stores_left = ~std::size_t{0};
    for (int i = 0; i < reads; ++i) {
        if (i % 4 == 0) machine.start(&segment.header.feedback.sequence);
        machine.haste = machine.random() % 4;
        if (!read_feedback(segment, sent)) continue;
        ++tally.feedback;
        const std::uint64_t n = sent.tick;
        bool whole = sent.driver == n && sent.chunk == n && sent.at_ns == static_cast<std::int64_t>(n) &&
                     sent.row == static_cast<std::int32_t>(n) && sent.status == static_cast<Status>(n % 6);
        for (int k = 0; k < kChannels; ++k) whole = whole && sent.values[k] == static_cast<double>(n);
        tally.feedback_torn += !whole;
    }
}

}  // namespace

int main(int count, char** arguments) {
    const int reads = static_cast<int>(ring_case::argument(count, arguments, "--reads", 200'000));
    model::Machine& machine = model::Machine::one();
    machine.random.seed(static_cast<std::uint64_t>(ring_case::argument(count, arguments, "--seed", 1)));
    const auto segment = std::make_unique<Segment>();
    Tally tally;
    one_writer(*segment, 40, reads, tally);
    nothing_overwritten(*segment, reads / 4, tally);
    fresh(*segment);
    publish_next(*segment);
    const std::size_t stores = machine.stored;
    for (std::size_t died = 0; died <= stores; ++died)
        dying_writer(*segment, died, stores, reads / static_cast<int>(stores), tally);
    for (int i = 0; i < 20; ++i) feedback(*segment, reads / 40, tally);
    std::printf("{\"reads\": %llu, \"torn\": %llu, \"older\": %llu, \"whole\": %llu, \"beyond\": %llu, \"contended\": %llu, "
                "\"gone\": %llu, \"missed\": %llu, \"ids_lost\": %llu, \"deaths\": %llu, \"feedback\": %llu, "
                "\"feedback_torn\": %llu}\n",
                tally.reads, tally.torn, tally.older, tally.whole, tally.tries_beyond, tally.contended, tally.gone, tally.missed,
                tally.ids_lost, tally.deaths, tally.feedback, tally.feedback_torn);
    return 0;
}
