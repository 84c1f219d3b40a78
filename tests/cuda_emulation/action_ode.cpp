// kernels/action_ode_*.cuh on a CPU, as a library for ctypes.
#include "action_ode_worker.cuh"

// 0, or 1 with the reason in `message`.
extern "C" int emulate_action_ode(const dit4dit::ode::Launch* launch, unsigned seed, char* message, int message_bytes) {
    using namespace dit4dit::ode;
    const std::size_t shared = kFixedBytes + static_cast<std::size_t>(launch->slots) * kSlotBytes + launch->staging;
    try {
        emulation::Machine machine(launch->workers, kThreads, shared, seed, [launch] { worker(*launch); });
        emulation::machine = &machine;
        machine.run();
    } catch (const std::exception& error) {
        std::strncpy(message, error.what(), message_bytes - 1);
        return 1;
    }
    return 0;
}

extern "C" int launch_bytes() { return sizeof(dit4dit::ode::Launch); }
