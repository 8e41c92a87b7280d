// Compiled once per instruction set (CMakeLists.txt): PPOMAX_NS names the copy, PPOMAX_TABLE its table.
#include "vector_ops.h"

#include "attention_loops.h"
#include "elementwise_loops.h"
#include "gae_loops.h"
#include "linear_loops.h"
#include "logprob_loops.h"
#include "loss_loops.h"
#include "rms_norm_loops.h"
#include "rotate_loops.h"
#include "sample_loops.h"
#include "silu_mul_loops.h"

namespace ppomax {

namespace PPOMAX_NS {
static float element(TypedArray array, int64_t at) { return one_float(array, at); }
}  // namespace PPOMAX_NS

extern const VectorOps PPOMAX_TABLE;
const VectorOps PPOMAX_TABLE = {
    PPOMAX_NS::logprob_row,
    PPOMAX_NS::logits_gradient,
    PPOMAX_NS::kl,
    PPOMAX_NS::kl_gradient,
    PPOMAX_NS::gae,
    PPOMAX_NS::moments,
    PPOMAX_NS::whiten,
    PPOMAX_NS::ppo,
    PPOMAX_NS::value,
    PPOMAX_NS::sample,
    PPOMAX_NS::attend,
    PPOMAX_NS::attention_weights,
    PPOMAX_NS::attention_gradient,
    PPOMAX_NS::linear_panel,
    PPOMAX_NS::linear_panel_bf16,
    PPOMAX_NS::rms_norm,
    PPOMAX_NS::rms_norm_gradient,
    PPOMAX_NS::silu_mul,
    PPOMAX_NS::silu_mul_gradient,
    PPOMAX_NS::rotate_typed,
    PPOMAX_NS::add_typed,
    PPOMAX_NS::element,
    PPOMAX_ISA_NAME,
};

}  // namespace ppomax
