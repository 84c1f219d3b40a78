// From chunks of actions to motor commands, between processes or in one: all of dit4dit's action stream. C++17, header-only.
//
// A controller:
//
//     auto reader = dit4dit::Reader::open({"/dit4dit.g1", /*driver=*/true});
//     if (!reader) { std::fprintf(stderr, "%s\n", reader.error().c_str()); return 1; }
//     reader->start_at(measured_pose);                        // [reader->dims()]
//     double values[dit4dit::kMaxChannels];
//     for (;;) {                                              // every reader->command_period_ns()
//         const dit4dit::Command command = reader->read(dit4dit::monotonic_ns(), values);
//         send(values, command.status);
//     }
//
// A producer has a Writer. docs/action-stream.md says what seams, limits and rules do.
#pragma once

#include "reader.h"
#include "writer.h"
