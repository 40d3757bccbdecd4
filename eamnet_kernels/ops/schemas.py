"""The operators' schemas: the one place where their signatures are written.

`setup.py` turns these tables into the headers that `csrc/schemas.cpp` registers, and `native.py`
refuses a library that was built from others, so that the compiled library and Python can never
disagree; where the library is not built, `eamnet_kernels.ops` registers the strings of the first
table. This file imports nothing, because `setup.py` executes it on its own.

Conventions
- `B` batch, `C` channels, `H`, `W` picture, `N = H*W` pixels, `h` heads, `d` channels of a head,
  `S` memory slots.
- Beside its result an operator returns what its backward needs. Every backend stores the same
  quantities in the same form, so that the backward may run on another backend than the forward.
- `backend` is `"auto"` or the name of a backend; see `eamnet_kernels.backends`.
"""

SCHEMAS: dict[str, str] = {
    # -> pixel_mean (B,1,H,W), pixel_max (B,1,H,W), channel_mean (B,C), channel_max (B,C),
    #    pixel_argmax (B,1,H,W) int32 channel index, channel_argmax (B,C) int64 pixel index
    "gate_statistics": (
        "gate_statistics(Tensor x, *, str backend='auto')"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "gate_statistics_backward": (
        "gate_statistics_backward(Tensor grad_pixel_mean, Tensor grad_pixel_max,"
        " Tensor grad_channel_mean, Tensor grad_channel_max, Tensor pixel_argmax,"
        " Tensor channel_argmax, bool channels_last, *, str backend='auto') -> Tensor"
    ),
    # -> out (B,h,N,d); branches (2,B,h,N,d), the two attentions before they are added, and
    #    lse (2,B,h,N) float32 (float64 for float64): both empty unless save_for_backward
    "cross_mix_pixels": (
        "cross_mix_pixels(Tensor q_s, Tensor k_s, Tensor v_s, Tensor q_c, Tensor k_c, Tensor v_c,"
        " Tensor? spatial_gate, float scale, bool save_for_backward, *, str backend='auto')"
        " -> (Tensor, Tensor, Tensor)"
    ),
    # -> gradients of the six inputs (B,h,N,d) and of the gate (B,N; empty where there is none)
    "cross_mix_pixels_backward": (
        "cross_mix_pixels_backward(Tensor grad_out, Tensor q_s, Tensor k_s, Tensor v_s,"
        " Tensor q_c, Tensor k_c, Tensor v_c, Tensor? spatial_gate, Tensor branches, Tensor lse,"
        " float scale, *, str backend='auto')"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # -> out (B,C,H,W), grams (3,B,C,C) float32 (float64 for float64): X diag(g_s^p) X^T, p = 0,1,2
    "cross_mix_channels": (
        "cross_mix_channels(Tensor x, Tensor spatial_gate, Tensor channel_gate, Tensor w_spatial,"
        " Tensor w_channel, Tensor w_out, Tensor temperature, *, str backend='auto')"
        " -> (Tensor, Tensor)"
    ),
    # -> gradients of the seven inputs
    "cross_mix_channels_backward": (
        "cross_mix_channels_backward(Tensor grad_out, Tensor x, Tensor spatial_gate,"
        " Tensor channel_gate, Tensor w_spatial, Tensor w_channel, Tensor w_out,"
        " Tensor temperature, Tensor grams, *, str backend='auto')"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # -> out (B,C,H,W), lse (B,S) float32 (float64 for float64), kept (B,C) bool
    "external_memory": (
        "external_memory(Tensor x, Tensor memory_key, Tensor memory_value, Tensor w_out,"
        " int top_k, *, str backend='auto') -> (Tensor, Tensor, Tensor)"
    ),
    # -> gradients of x, memory_key, memory_value, w_out
    "external_memory_backward": (
        "external_memory_backward(Tensor grad_out, Tensor x, Tensor memory_key,"
        " Tensor memory_value, Tensor w_out, Tensor lse, Tensor kept, *, str backend='auto')"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # -> out (B,C,H,W); preactivation (B,n*c,H,W), the n branches before the activation:
    #    empty unless save_for_backward
    "multi_dilation_conv": (
        "multi_dilation_conv(Tensor x, Tensor[] w_branches, Tensor w_point, Tensor? bias,"
        " int[] dilations, str activation, bool save_for_backward, *, str backend='auto')"
        " -> (Tensor, Tensor)"
    ),
    # -> gradients of x, w_branches, w_point and bias (empty where there is none)
    "multi_dilation_conv_backward": (
        "multi_dilation_conv_backward(Tensor grad_out, Tensor x, Tensor[] w_branches,"
        " Tensor w_point, bool has_bias, int[] dilations, str activation, Tensor preactivation,"
        " *, str backend='auto') -> (Tensor, Tensor[], Tensor, Tensor)"
    ),
}

# The kernels of the `cpu` backend: `csrc/cpu/<operator>.cpp` implements them, and says what they
# take and give; `eamnet_kernels/cpu/<operator>.py` calls them.
NATIVE_SCHEMAS: dict[str, str] = {
    "cpu_level": "cpu_level() -> str",
    "gate_statistics": (
        "gate_statistics(Tensor x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "gate_statistics_backward": (
        "gate_statistics_backward(Tensor grad_pixel_mean, Tensor grad_pixel_max,"
        " Tensor grad_channel_mean, Tensor grad_channel_max, Tensor pixel_argmax,"
        " Tensor channel_argmax, bool channels_last) -> Tensor"
    ),
    "cross_mix_channels_grams": "cross_mix_channels_grams(Tensor x, Tensor spatial_gate) -> Tensor",
    "cross_mix_channels_apply": (
        "cross_mix_channels_apply(Tensor x, Tensor spatial_gate, Tensor matrices,"
        " bool channels_last) -> Tensor"
    ),
    "cross_mix_channels_grad_matrices": (
        "cross_mix_channels_grad_matrices(Tensor grad_out, Tensor x, Tensor spatial_gate) -> Tensor"
    ),
    "cross_mix_channels_apply_backward": (
        "cross_mix_channels_apply_backward(Tensor grad_out, Tensor x, Tensor spatial_gate,"
        " Tensor matrices, Tensor doubled, bool channels_last) -> (Tensor, Tensor)"
    ),
    "external_memory": (
        "external_memory(Tensor x, Tensor key, Tensor value, Tensor w_out, int top_k,"
        " bool channels_last) -> (Tensor, Tensor, Tensor)"
    ),
    "external_memory_backward": (
        "external_memory_backward(Tensor grad_out, Tensor x, Tensor key, Tensor readout,"
        " Tensor lse, bool channels_last) -> (Tensor, Tensor, Tensor)"
    ),
    "multi_dilation_conv": (
        "multi_dilation_conv(Tensor x, Tensor[] w_branches, Tensor w_point, Tensor? bias,"
        " int[] dilations, str activation, bool save_for_backward, bool channels_last)"
        " -> (Tensor, Tensor)"
    ),
    "multi_dilation_conv_backward": (
        "multi_dilation_conv_backward(Tensor grad_out, Tensor x, Tensor[] w_branches,"
        " Tensor w_point, bool has_bias, int[] dilations, str activation, Tensor preactivation,"
        " bool channels_last) -> (Tensor, Tensor[], Tensor, Tensor)"
    ),
    "cross_mix_pixels": (
        "cross_mix_pixels(Tensor q_s, Tensor k_s, Tensor v_s, Tensor q_c, Tensor k_c,"
        " Tensor v_c, Tensor? spatial_gate, float scale, bool save_for_backward)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "cross_mix_pixels_backward": (
        "cross_mix_pixels_backward(Tensor grad_out, Tensor q_s, Tensor k_s, Tensor v_s,"
        " Tensor q_c, Tensor k_c, Tensor v_c, Tensor? spatial_gate, Tensor branches, Tensor lse,"
        " float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}
