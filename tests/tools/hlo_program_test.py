import jax
import jax.numpy as jnp
import pytest

from tools import hlo_program
from tools.hlo_shape import HloError

# Line breaks and braces inside of an attribute, as Mosaic kernels have them.
KERNEL = """HloModule jit_f, is_scheduled=true, num_partitions=4

FileNames
1 "train.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=27 end_line=27 column=0}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%sum (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a.1, %b.1)
}

ENTRY %main (x: f32[8,128], y: f32[]) -> (f32[8,128], f32[8]) {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %y = f32[] parameter(1)
  %kernel = f32[8,128]{1,0:T(8,128)} custom-call(%x, /*index=1*/%y), \
custom_call_target="tpu_custom_call", kernel_metadata={
    name = "a, b",
    blocks = [(8, 128), (1, 1)]
}, metadata={op_name="jit(f)/\\"odd\\", name" stack_frame_id=1}, \
backend_config={"custom_call_config":{"body":"bWxpciB9KQ==\\n}",\
"cost_estimate":{"flops":"77"}}}
  %reduce = f32[8]{0} reduce(%kernel, %y), dimensions={1}, to_apply=%sum
  ROOT %out = (f32[8,128]{1,0:T(8,128)}, f32[8]{0}) tuple(%kernel, %reduce)
}
"""


def test_attributes_over_several_lines():
  module = hlo_program.parse(KERNEL)
  entry = module[module.entry]
  kernel = entry["kernel"]
  assert kernel.operands == ("x", "y")
  assert kernel.op_name == r"jit(f)/\"odd\", name"
  assert "blocks" in kernel.attributes["kernel_metadata"]
  config = kernel.backend_config["custom_call_config"]
  assert config["cost_estimate"] == {"flops": "77"}
  assert module.source(kernel) == "train.py:27"
  assert module.source(entry["x"]) == ""


def test_the_parts_of_a_module():
  module = hlo_program.parse(KERNEL)
  entry = module[module.entry]
  assert (module.name, module.partitions) == ("jit_f", 4)
  assert [p.name for p in entry.parameters] == ["x", "y"]
  assert entry.root.name == "out" and entry.root.is_root
  assert [u.name for u in entry.users["kernel"]] == ["reduce", "out"]
  assert entry["reduce"].integers("dimensions") == (1,)
  assert entry["reduce"].called == ("sum",)
  assert [i.opcode for i in module["sum"]] == ["parameter", "parameter", "add"]


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("HloModule", "module", "not optimized HLO text"),
    ("ENTRY ", "", "no ENTRY"),
    ("reduce(%kernel", "reduce(%colonel", "reads colonel, unknown"),
    ("to_apply=%sum", "to_apply=%product", "calls product, which is not"),
    ("%y = f32[] par", "%y := f32[] par", "main: not understood"),
    ("f32[8]{0} reduce", "f99[8]{0} reduce", "unknown element type 'f99'"),
    ("dimensions={1}", "dimensions={1", "main is cut off"),
    ("num_partitions=4", "replica_count=2", "replica_count=2"),
  ],
)
def test_what_is_not_understood_is_an_error(old, new, message):
  with pytest.raises(HloError, match=message):
    hlo_program.parse(KERNEL.replace(old, new))


def test_text_that_is_cut_off():
  with pytest.raises(HloError, match="computation main is cut off"):
    hlo_program.parse(KERNEL[: KERNEL.index("  %reduce")])


def test_a_program_compiled_here():
  def f(x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x[0], x)

  compiled = jax.jit(f).lower(jnp.zeros((5, 16, 16))).compile()
  module = hlo_program.parse(compiled.as_text())
  opcodes = {i.opcode for c in module.computations.values() for i in c}
  assert "while" in opcodes and {"dot", "custom-call"} & opcodes
  assert module.partitions == 1
  sources = {module.source(i) for i in module[module.entry]}
  assert any("hlo_program_test.py:" in s for s in sources)
