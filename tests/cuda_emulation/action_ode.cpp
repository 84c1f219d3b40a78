// kernels/action_ode_*.cuh on a CPU, as a library for ctypes.
#include "action_ode_worker.cuh"

// 0, or 1 with the reason in `message`.
extern "C" int emulate_action_ode(const dit4dit::ode::Launch* launch, int shared_bytes, unsigned seed, char* message,
                                  int message_bytes) {
    using namespace dit4dit::ode;
    try {
        emulation::Machine machine(launch->teams * launch->ranks, kThreads, static_cast<std::size_t>(shared_bytes), seed,
                                   [launch] { worker(*launch); }, launch->ranks);
        emulation::machine = &machine;
        machine.run();
    } catch (const std::exception& error) {
        std::strncpy(message, error.what(), message_bytes - 1);
        return 1;
    }
    return 0;
}

extern "C" int launch_bytes() { return sizeof(dit4dit::ode::Launch); }
