// kernels/self_attention.cuh on a CPU, as a library for ctypes.
#include "self_attention.cuh"

template <int kQueries>
void emulate(const dit4dit::attention::Request& request, int blocks, unsigned seed) {
    using Block = dit4dit::attention::Block<kQueries>;
    emulation::Machine machine(blocks, Block::kThreads, dit4dit::attention::kSharedBytes, seed,
                               [&request] { Block(request).run(); });
    emulation::machine = &machine;
    machine.run();
}

// 0, or 1 with the reason in `message`.
extern "C" int emulate_self_attention(const dit4dit::attention::Request* request, int batch, int queries, unsigned seed,
                                      char* message, int message_bytes) {
    const int blocks = batch * request->heads * ((request->length + queries - 1) / queries);
    try {
        queries == 64 ? emulate<64>(*request, blocks, seed) : emulate<128>(*request, blocks, seed);
    } catch (const std::exception& error) {
        std::strncpy(message, error.what(), message_bytes - 1);
        return 1;
    }
    return 0;
}

extern "C" int shared_bytes() { return dit4dit::attention::kSharedBytes; }
extern "C" int request_bytes() { return sizeof(dit4dit::attention::Request); }
