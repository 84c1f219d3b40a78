// Between this and exact_end.h no multiplication is fused with an addition, whatever the flags of whoever includes it: commands are
// the same bits in every build. Included again and again: no include guard.
#if defined(__clang__)
#pragma float_control(push)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif
