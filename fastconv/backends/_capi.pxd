# The C interface, csrc/fastconv.h.
from libc.stdint cimport int64_t, uint64_t


cdef extern from "fastconv.h" nogil:
    const void *fc_kernel_table(const char *isa, int is_double)
    const char *fc_isa_name(int index)
    const char *fc_kernel_name(int index)
    int fc_fma_rate(const char *isa)
    void fc_tile(const void *kernels, int is_double, int tile[3])

    uint64_t fc_flush_denormals()
    void fc_restore_denormals(uint64_t state)

    ctypedef struct fc_lattice:
        int64_t batch, groups, in_channels, out_channels
        int64_t in_size[3]
        int64_t out_size[3]
        int64_t step[3]
        int64_t taps
        const int64_t *tap_at
        const int64_t *tap_w
        int64_t in_stride[5]
        int64_t out_stride[5]
        int64_t in_offset, out_offset
        int64_t w_stride[3]
        int is_double
        int gather
        const void *kernels

    ctypedef struct fc_conv:
        fc_lattice l
        int relu
        int pixels_are_rows
        int64_t tasks, pack_tasks, packed_bytes, workspace_bytes

    void fc_conv_block(fc_conv *p)
    void fc_conv_pack(const fc_conv *p, const void *w, void *packed, int64_t task)
    int fc_conv_run(const fc_conv *p, const void *x, const void *packed, const void *bias, void *out,
                     void *workspace, int64_t task)

    ctypedef struct fc_direct:
        fc_lattice l
        int relu
        int64_t min_tasks, tasks, pack_tasks, packed_bytes, workspace_bytes

    void fc_direct_block(fc_direct *p)
    void fc_direct_pack(const fc_direct *p, const void *w, void *packed, int64_t task)
    int fc_direct_run(const fc_direct *p, const void *x, const void *packed, const void *bias, void *out,
                      void *workspace, int64_t task)

    ctypedef struct fc_direct_raw:
        fc_lattice l
        fc_direct *phases
        int worth
        int64_t n_phases, min_tasks, tasks, workspace_bytes

    void fc_direct_raw_block(fc_direct_raw *p)
    int fc_direct_raw_run(const fc_direct_raw *p, const void *x, const void *w, const void *bias, void *out,
                          void *workspace, int64_t task)

    ctypedef struct fc_pixels:
        const fc_lattice *phases
        int64_t n_phases
        int relu
        int64_t min_tasks, tasks, pack_tasks, packed_bytes, workspace_bytes

    void fc_pixels_block(fc_pixels *p)
    void fc_pixels_pack(const fc_pixels *p, const void *w, void *packed, int64_t task)
    int fc_pixels_run(const fc_pixels *p, const void *x, const void *packed, const void *bias, void *out,
                      void *workspace, int64_t task)

    ctypedef struct fc_wino:
        fc_lattice l
        int relu, shape, raw, fused
        int64_t dilation[3]
        int64_t min_tasks, tasks, pack_tasks, packed_bytes, workspace_bytes

    void fc_wino_block(fc_wino *p)
    void fc_wino_pack(const fc_wino *p, const void *w, void *packed, int64_t task)
    int fc_wino_run(const fc_wino *p, const void *x, const void *weights, const void *bias, void *out,
                    void *workspace, int64_t task)
    const char *fc_wino_shape(int index, int outputs[3], int points[3], int *taps)

    enum:
        FC_BY_PIXELS

    ctypedef struct fc_channelwise:
        fc_lattice l
        int relu, form
        int64_t tasks, pack_tasks, packed_bytes, workspace_bytes

    void fc_channelwise_block(fc_channelwise *p)
    void fc_channelwise_pack(const fc_channelwise *p, const void *w, void *packed, int64_t task)
    int fc_channelwise_run(const fc_channelwise *p, const void *x, const void *packed, const void *bias, void *out,
                            void *workspace, int64_t task)

    enum:
        FC_WGRAD_DIRECT
        FC_WGRAD_IM2COL
        FC_WGRAD_WINOGRAD
        FC_WGRAD_CHANNELWISE

    ctypedef struct fc_wgrad:
        fc_lattice l
        int form, shape
        int64_t dilation[3]
        int64_t splits, tasks, merge_tasks, partial_bytes, workspace_bytes, merge_bytes

    void fc_wgrad_block(fc_wgrad *p)
    int fc_wgrad_run(const fc_wgrad *p, const void *x, const void *dy, void *dw, void *partial, void *workspace,
                     int64_t task)
    void fc_wgrad_merge(const fc_wgrad *p, const void *partial, void *dw, void *workspace, int64_t task)
