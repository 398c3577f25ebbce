import pytest

from tdm_jax.analysis import hlo

TEXT = """
%all-reduce-scatter.2 (input.2: bf16[64,512]) -> bf16[16,512] {
  %f = bf16[64,512]{1,0} all-reduce(%input.2), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %g = bf16[16,512]{1,0} dynamic-slice(%f, %i, %j)
}
%all-reduce-scatter.3 (input.2: bf16[32,512]) -> bf16[8,512] {
  %f = bf16[32,512]{1,0} all-reduce(%input.2), channel_id=7, replica_groups=mesh['a'=2,'b'=4,'c'=2], device_ids=([4,4]T(1,0)) {'b','c'}, to_apply=%add
}
%async_collective_fusion.1 (param_0.1: bf16[16,512]) -> bf16[64,512] {
  %h = bf16[64,512]{1,0} all-gather(%param_0.1), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}
}
%async_collective_fusion.2 (param_0.2: bf16[16,512]) -> bf16[64,512] {
  %k = bf16[64,512]{1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=9, dimensions={0}
}
ENTRY %main () -> f32[] {
  %a = (f32[32,16]{1,0}, /*index=1*/bf16[8]{0}, f32[]) all-reduce(%x, %y, %z), channel_id=1
  %b = (f32[128]{0}, f32[1024]{0}) all-gather-start(%w), channel_id=2, replica_groups=[4,2]<=[8]
  %c = f32[1024]{0} all-gather-done(%b)
  %d = f32[32,16]{1,0} get-tuple-element(%all-reduce.1), index=0
  %e = f32[4,16]{1,0} reduce-scatter(%d), channel_id=3, dimensions={0}
  %p = f32[10]{0} collective-permute(%q), channel_id=4, source_target_pairs={{0,1},{1,0}}
"""  # noqa: E501

LOOP = """
%body (s: f32[8]) -> f32[8] {
  %x = f32[8]{0} all-reduce(%s), channel_id=1, replica_groups={}, to_apply=%add
  %g = f32[8]{0} gather(%x, %i)
  %y = f32[8]{0} fusion(%g), calls=%fused, metadata={op_name="jit/ViT/blocks_3/attn/qkv/dot"}, \
backend_config={"window_config":{"estimated_cycles":"10"}}
}
%fused (p: f32[8]) -> f32[8] {
  ROOT %z = f32[8]{0} add(%p, %p)
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%a), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
  %t = f32[8]{0} fusion(%w), metadata={op_name="jit/ViT/blocks_3/norm2/add"}, \
backend_config={"estimated_cycles":"7"}
  %u = f32[8]{0} fusion(%t), metadata={op_name="jit/ViT/blocks_3/top_k"}, \
backend_config={"estimated_cycles":"5"}
  %k = f32[8]{0} custom-call(%u), custom_call_target="tpu_custom_call"
  %l = f32[8]{0} custom-call(%k), custom_call_target="ConcatBitcast"
  ROOT %v = f32[8]{0} sort(%u), backend_config={"estimated_cycles":"1"}
}
"""


def test_collectives_are_read_from_the_program():
    reduced, gathered = 32 * 16 * 4 + 8 * 2 + 4, 64 * 512 * 2
    assert hlo.collectives(TEXT, 8) == {
        "all-reduce": (1, reduced, pytest.approx(2 * 7 / 8 * reduced)),
        "all-gather": (2, gathered + 4096, pytest.approx(7 / 8 * gathered + 4096 / 2)),
        "reduce-scatter": (
            3,
            3 / 2 * gathered + 2048,
            pytest.approx((3 / 4 + 7 / 8 / 2) * gathered + 7 / 8 * 2048),
        ),
        "collective-permute": (1, 40, 40),
    }


def test_a_loop_counts_as_often_as_it_runs():
    assert hlo.collectives(LOOP, 4) == {"all-reduce": (12, 12 * 32, pytest.approx(12 * 48))}
    assert hlo.cycles(LOOP) == {"attention": 120, "mlp": 7, "stage": 5, hlo.REST: 1}
    assert hlo.unpriced(LOOP) == 12 + 1 + 1


def test_other_compilers_estimate_nothing():
    assert hlo.cycles(TEXT) == {}
