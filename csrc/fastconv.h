/* The C interface of fastconv, as backends/_cpu.pyx sees it.
 *
 * C computes: it allocates nothing, prints nothing, starts no thread and never aborts.  The caller owns every pointer;
 * a plan (fc_conv, fc_wgrad) is constant while tasks of it run.  Tasks of one plan write disjoint outputs and may run
 * in any order on any thread, each with a workspace of its own; what a task computes depends on the problem alone.
 *
 * All strides and offsets are 64-bit and counted in elements.  Spatial axes are always depth, height, width. */
#ifndef FASTCONV_H
#define FASTCONV_H

#include <stdint.h>

/* ---- Kernel tables ------------------------------------------------------------------------------------------- */

/* The table of an ISA ("generic", "avx2", "avx512", "neon"), or null if this build or this CPU lacks it. */
const void *fc_kernel_table(const char *isa, int is_double);
/* Names of ISAs, from the portable one upward; null past the end. */
const char *fc_isa_name(int index);
/* Lanes, and rows and columns of the largest register tile. */
void fc_tile(const void *kernels, int is_double, int tile[3]);
/* Multiply-adds of whole vectors of an ISA that a core of this CPU starts in a cycle. */
int fc_fma_rate(const char *isa);
/* Names of the kernel slots; null past the end. */
const char *fc_kernel_name(int index);

/* ---- Denormals ------------------------------------------------------------------------------------------------ */

/* Treat denormal numbers as zero on this thread until the returned state is restored: they cost 20 to 100 times the
 * time of others. */
uint64_t fc_flush_denormals(void);
void fc_restore_denormals(uint64_t state);

/* ---- Convolution ---------------------------------------------------------------------------------------------- */

/* A correlation over a lattice, the form that all passes reduce to:
 *
 *      out[n, k, o] = sum over taps t, channels c of in[n, c, o * step + tap_at[t]] * w[k, c, t]
 *
 * Positions outside the input are zeros that take part.  The forward pass is one lattice: tap_at = t * dilation - pad.
 * The data gradient at stride s is s^d of them (its phases), each with the taps that meet it and step 1, writing every
 * s-th element of dx: strides and offset of `out` say which.  So are dilated convolutions that Winograd takes apart. */
typedef struct {
    int64_t batch, groups, in_channels, out_channels; /* channels of one group */
    int64_t in_size[3], out_size[3], step[3];
    int64_t taps;
    const int64_t *tap_at;               /* taps x 3 */
    const int64_t *tap_w;                /* taps: offset of the tap in w */
    int64_t in_stride[5], out_stride[5]; /* batch, channel, depth, height, width */
    int64_t in_offset, out_offset;
    int64_t w_stride[3]; /* group, out channel, in channel */
    int is_double;
    int gather;          /* 1: gather all patches (im2col); 0: read the input in place where it allows (direct) */
    const void *kernels; /* from fc_kernel_table */
} fc_lattice;

/* out = lattice(in, w), in blocks.
 *
 *   pixels_are_rows = 1 (out channels are contiguous, NHWC)      0 (pixels are contiguous, NCHW)
 *
 *             nr out channels                                              nr pixels
 *           +-----------------+                                       +-----------------+
 *   mr      |                 |  A = patches, in place or     mr out  |                 |  A = packed weights [r][mr]
 *   pixels  |    C = tile     |      gathered [pixel][r]     channels |    C = tile     |  B = patches, in place or
 *           |                 |  B = packed weights [r][nr]           |                 |      gathered [r][nr]
 *           +-----------------+                                       +-----------------+
 *
 * r = tap * in_channels + channel runs over the reduction in chunks.  A task is a block of pixels of one image and
 * group times a range of weight panels. */
typedef struct {
    fc_lattice l;
    int relu;
    int pixels_are_rows, out_is_flat, by_rows;
    int64_t tap_low[3], tap_high[3];
    int64_t reduction, chunk, chunks;
    int64_t pixels, block_pixels, blocks, max_strips;
    int64_t panels, panels_per_task, panel_blocks;
    int64_t tasks, pack_tasks;
    int64_t packed_bytes, workspace_bytes;
} fc_conv;

/* Fills in the blocking from `l` and `relu`. */
void fc_conv_block(fc_conv *p);
/* Packs one panel of the weights, 0 <= task < pack_tasks. */
void fc_conv_pack(const fc_conv *p, const void *w, void *packed, int64_t task);
/* Runs one task, 0 <= task < tasks.  `bias` (all out channels, contiguous) may be null.  Returns 1. */
int fc_conv_run(const fc_conv *p, const void *in, const void *packed, const void *bias, void *out, void *workspace,
                int64_t task);

/* The same from rows of the input, as they lie there or in a padded copy of those that a box of outputs needs:
 *
 *      input          copy, in L2: channels contiguous,        products with packed weights [r][nr], tiles of
 *      any strides    padding zero, only rows that a tap       mr pixels of a row x nr channels, one term per tap
 *                     of the box meets                         (taps that lie side by side in memory are one)
 *
 * Outputs whose channels are not contiguous are transposed from a buffer.  A task is a box of outputs of one image and
 * group times a range of weight panels.  Taps that meet nothing but padding are left out if the weights are finite. */
typedef struct {
    fc_lattice l;
    int relu;
    int staged;              /* whether rows are copied */
    int64_t min_tasks;       /* cut smaller boxes and ranges until there are as many tasks; changes no result */
    int64_t low[3], span[3]; /* input position of the lowest tap for output 0; positions that taps span */
    int64_t spacing[3];      /* between taps */
    int skip_along_rows;     /* whether padding is so wide that a tap can miss a tile */
    int64_t box[3], boxes[3];
    int64_t pitch; /* elements between pixels of the copy */
    int64_t reduction, chunk, chunks;
    int64_t panels, panels_per_task, panel_blocks;
    int64_t stage, products; /* elements of the copy and of the buffer */
    int64_t tasks, pack_tasks, packed_bytes, workspace_bytes;
} fc_direct;

/* Fills in the blocking from `l`, `relu` and `min_tasks`. */
void fc_direct_block(fc_direct *p);
void fc_direct_pack(const fc_direct *p, const void *w, void *packed, int64_t task);
int fc_direct_run(const fc_direct *p, const void *in, const void *packed, const void *bias, void *out, void *workspace,
                  int64_t task);

/* The same for weights that are used once, as they are: a task packs one panel of one group, which stays in L2, and
 * runs all boxes of all images with it.  `phases` are lattices that differ in their taps, in out_size and out_offset:
 * those of a strided data gradient, which are packed together. */
typedef struct {
    fc_lattice l; /* of the weights: the taps of all phases, one after the other */
    fc_direct *phases;
    int64_t n_phases;
    int64_t min_tasks; /* wanted; changes no result */
    int64_t panels;
    int worth; /* whether this takes less time than packing all weights first */
    int64_t tasks, workspace_bytes;
} fc_direct_raw;

/* Fills in the rest from `l`, `n_phases`, `min_tasks` and `l` and `relu` of each phase. */
void fc_direct_raw_block(fc_direct_raw *p);
int fc_direct_raw_run(const fc_direct_raw *p, const void *in, const void *w, const void *bias, void *out,
                      void *workspace, int64_t task);

/* The same with lanes of pixels, for few output channels, for few input channels in NCHW, or for phases of a data gradient
 * that lie side by side:
 *
 *      input          copy, in L2: columns contiguous,         packed weights [r][mr] x rows of the copy, tiles of
 *      any strides    padding zero, by their residues          mr channels x nr pixels; a tile runs on from one row
 *                     modulo step                              of outputs to the next
 *
 * Where all taps lie at one position, the input itself takes the place of the copy.
 *
 * `phases` are lattices that differ in their taps, along the width in out_size, and in out_offset: those of a strided
 * data gradient that write the same rows.  A task is a box of outputs of one slice, image and group times a range of
 * weight panels. */
typedef struct {
    fc_lattice l; /* what the phases share, their largest out_size, the taps of the first */
    const fc_lattice *phases;
    int64_t n_phases;
    int relu;
    int64_t min_tasks;             /* as in fc_direct */
    int64_t low[3], span[3];       /* the lowest tap for output 0; positions that taps span */
    int64_t box[2];                /* rows, columns */
    int64_t residues[3], held[3];  /* of the copy: residues that are needed, positions for each */
    int64_t plane, copy;           /* elements of a channel of the copy, of all */
    int in_place;                  /* taps lie at one position, rows of the input side by side: nothing to copy */
    int64_t chunk, panels, height; /* height: out channels of a panel */
    int64_t panel_size;            /* elements of the weights of a panel, of all phases */
    int64_t panels_per_task, panel_blocks, max_terms;
    int64_t tasks, pack_tasks, packed_bytes, workspace_bytes;
} fc_pixels;

/* Fills in the rest from `phases`, `n_phases`, `relu` and `min_tasks`. */
void fc_pixels_block(fc_pixels *p);
void fc_pixels_pack(const fc_pixels *p, const void *w, void *packed, int64_t task);
int fc_pixels_run(const fc_pixels *p, const void *in, const void *packed, const void *bias, void *out, void *workspace,
                  int64_t task);

/* The same by Winograd's minimal filtering F(m, r), for lattices whose taps fill a box without gaps.  Along each axis
 * the taps are cut into parts, by their residue modulo step, and then into at most r neighbours: with step 2 and r = 2
 *
 *      taps   0 1 2      part 0: taps 0 and 2, on inputs  0 2 4 6 ..
 *                        part 1: tap  1,       on inputs  1 3 5 7 ..
 *
 * With dilation d, step 1, the outputs fall into sub-grids, which see every d-th input and are as images of their own:
 *
 *      d = 2        out  0   2   4        1   3   5
 *                   in   0   2   4   6    1   3   5   7
 *
 * A term is a part of each axis, a convolution with step 1 and at most r taps; all of them are summed before the way
 * back.  Parts of fewer than r taps have zeros in the last transformed weight (the point at infinity), which is skipped.
 *
 * A task takes a block of output tiles (of all images of the batch) and a range of panels of nr out channels:
 *
 *      V[point][tile][term][channel]   transformed patches; stays in L2
 *      for each panel:  M[point][tile][nr] = V[point] x U[point][term][channel][nr], one product per point;
 *                       the outputs of each tile, with bias and relu, from its points of M
 *
 * A NaN or infinity in a patch reaches all outputs of its tile, and a patch of huge numbers may overflow: a task
 * returns 0 if an output is not finite, and the caller runs the convolution another way. */
typedef struct {
    fc_lattice l;
    int relu;
    int shape;                     /* row of winograd.def */
    int64_t min_tasks;             /* threads, that tasks are to keep busy; changes no result */
    int raw;                       /* weights come as they are, so that tasks may transform them; changes no result */
    int fused;                     /* they do, and nothing is to be packed */
    int64_t dilation[3], grids[3]; /* of the taps; sub-grids of outputs along an axis: dilation, or fewer */
    int64_t first[3],
        extent[3];           /* input position of the first tap for output 0; positions in a sub-grid that taps span */
    int64_t parts[3], terms; /* of the taps of each axis; parts[0] * parts[1] * parts[2] */
    int64_t depth;           /* mean terms x channels of a point's product */
    int64_t tiles[3], tiles_per_grid, all_tiles, block_tiles, blocks; /* of a sub-grid; of all of them and all images */
    int64_t panels, panels_per_task, panel_blocks;
    int64_t panel; /* elements of the transformed weights of one */
    int64_t term_width, ldv, ldq_u, ldq_v, ldq_m, stage;
    int64_t tasks, pack_tasks, packed_bytes, workspace_bytes;
} fc_wino;

/* Terms of a convolution by Winograd, and taps of one part. */
enum { FC_WINO_TERMS = 64, FC_WINO_TAPS = 5 };

/* Fills in the blocking from `l`, `relu`, `shape`, `dilation`, `min_tasks` and `raw`. */
void fc_wino_block(fc_wino *p);
void fc_wino_pack(const fc_wino *p, const void *w, void *packed, int64_t task);
int fc_wino_run(const fc_wino *p, const void *in, const void *weights, const void *bias, void *out, void *workspace,
                int64_t task);
/* Row `index` of winograd.def: its name, outputs per tile and points along each axis, taps; null past the end. */
const char *fc_wino_shape(int index, int outputs[3], int points[3], int *taps);

/* Lattices of groups of few channels.  A block is as many groups as a vector holds.
 *
 *   FC_BY_CHANNELS (NHWC)  a task is a few rows of pixels of one image, all channels; patches are read in place, taps in
 *                          the padding from a row of zeros
 *   FC_BY_BLOCKS (NCHW)    a task is a few rows of one block, copied to [pixel][channel] and back
 *   FC_BY_PIXELS (NCHW)    groups of one channel: a task is a few rows of a few channels of one image, 3 x 3 taps at step 1
 *                          in place where there are masks (depthwise_edges.inc.c), else each by way of a padded copy,
 *                          dealt out by the column modulo step, so that the inputs of neighbouring pixels under one tap
 *                          lie side by side:
 *
 *           step 2:  x0 x1 x2 x3 x4 x5 ..   ->   x0 x2 x4 .. | x1 x3 x5 ..  */
enum { FC_BY_CHANNELS, FC_BY_BLOCKS, FC_BY_PIXELS };

typedef struct {
    fc_lattice l;
    int relu;
    int form, picked;             /* picked: groups have several channels */
    int64_t count[3], spacing[3]; /* the box of taps, ascending along each axis */
    int flipped[3];               /* whether the taps of the lattice descend */
    int64_t first[3], extent[3];  /* input position of the lowest tap for output 0; positions that taps span */
    int64_t block_groups, blocks; /* groups of a block */
    int64_t band, bands;          /* output rows of a task */
    int64_t columns, segments;    /* output columns of a task */
    int64_t zeros;                /* elements that stand for the padding */
    int64_t slice;                /* elements of a slice of input that is held */
    int64_t held[2];              /* by blocks: rows and columns of it */
    /* by pixels: channels of a task, those that are copied together; slices that are held of each; elements of a row of them
     * for one residue, for all; whether output slices reach into the padding; whether what does not can be read in place, and
     * whether all of it can, with masks for the padding */
    int64_t channels, together, slots, deal, row, pads_depth, in_place, edges;
    int64_t tasks, pack_tasks, packed_bytes, workspace_bytes;
} fc_channelwise;

void fc_channelwise_block(fc_channelwise *p);
void fc_channelwise_pack(const fc_channelwise *p, const void *w, void *packed, int64_t task);
int fc_channelwise_run(const fc_channelwise *p, const void *in, const void *packed, const void *bias, void *out,
                       void *workspace, int64_t task);

/* dw[k, c, t] = sum over n, o of in[n, c, o * step + tap_at[t]] * out[n, k, o], where `out` of the lattice is dy.
 *
 * A task makes a block of dw, a range of channels times a range of out channels, all taps.  The reduction over (n, o)
 * runs in units of fixed size, whose partial sums are added in order.  If there are few blocks, it is split into
 * `splits` parts, which are tasks of their own, and a second phase adds them in order.
 *
 *   FC_WGRAD_DIRECT       a unit is a box of outputs, of several images if they are small; the input rows under it are
 *                         copied, padded, strip of channels by strip, and dy panel by panel, so that the product of
 *                         each tap with its pixels reads both from L1:
 *
 *                             copy[strip][image][z][y][x][channels of a strip]      panels[panel][pixel][nr]
 *
 *                         Few channels stay side by side instead, and taps along a row are then rows of one product.
 *   FC_WGRAD_IM2COL       a unit is a range of pixels of an image; patches are gathered: copy[pixel][tap][channel]
 *   FC_WGRAD_WINOGRAD     F(r, m) with the points of the forward pass; a unit is a block of tiles.  Per point q,
 *                         M[q][channel][out channel] += V[q][tile][channel] x Z[q][tile][out channel], the transforms
 *                         of the patches and of the tiles of dy; in the end dw is the transform of M.  A task returns
 *                         0 if a result is not finite, and the caller runs the gradient another way.
 *   FC_WGRAD_CHANNELWISE  groups of few channels: a block is as many groups as a vector holds, and a lane is an out
 *                         channel; copies as for FC_WGRAD_DIRECT, one strip.  The lattice counts as one group then. */
enum { FC_WGRAD_DIRECT, FC_WGRAD_IM2COL, FC_WGRAD_WINOGRAD, FC_WGRAD_CHANNELWISE };

typedef struct {
    fc_lattice l;
    int form, shape;                        /* shape: of Winograd, a row of winograd.def */
    int64_t dilation[3], grids[3];          /* of Winograd: sub-grids, as in fc_wino */
    int64_t block_channels, channel_blocks; /* of dw */
    int64_t block_out, out_blocks, ldk;     /* out channels of a block, in whole vectors */
    int64_t units, min_units, splits;       /* min_units: that a split is worth */
    int64_t low[3], span[3], base[3];       /* of the taps: lowest position, positions that they span, lowest tap */
    int64_t box[4], boxes[4];               /* image, depth, height, width */
    int64_t group, group_out;               /* channelwise: channels of a group */
    int64_t merged, strips, pitch, stage;   /* merged: taps of a run of rows; stage: elements of a strip's copy */
    int64_t tiles[3], tiles_per_grid, all_tiles, block_tiles, ldc, ldq_v, ldq_z;
    int64_t tasks, merge_tasks;
    int64_t partial_bytes, workspace_bytes, merge_bytes;
} fc_wgrad;

/* Fills in the blocking from `l`, `form`, `shape` and `dilation`. */
void fc_wgrad_block(fc_wgrad *p);
/* One task: writes dw if splits == 1, else its part of `partial`. */
int fc_wgrad_run(const fc_wgrad *p, const void *in, const void *dy, void *dw, void *partial, void *workspace,
                 int64_t task);
/* Adds the parts of one block into dw, 0 <= task < merge_tasks; only if splits > 1. */
void fc_wgrad_merge(const fc_wgrad *p, const void *partial, void *dw, void *workspace, int64_t task);

#endif
