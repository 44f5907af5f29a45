"""What is read from a compiler's text: collectives, the largest temporaries with their names, the refused line."""

from __future__ import annotations

import torch

from tpuspec.engine.compiled_text import count_collectives, largest_temporaries, refusing_place

TEXT = f"""HloModule jit_step, is_scheduled=true

FileNames
1 "{torch.__file__}"
2 "/home/me/model.py"

FunctionNames
1 "forward"

FileLocations
1 {{file_name_id=2 function_name_id=1 line=24 end_line=24 column=0 end_column=0}}
2 {{file_name_id=1 function_name_id=1 line=7 end_line=7 column=0 end_column=0}}

StackFrames
1 {{file_location_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}

%fused (p: f32[9999,9999]) -> f32[9999,9999] {{
  ROOT %big = f32[9999,9999]{{1,0}} add(%p, %p)
}}

ENTRY %main (x: f32[8,64]) -> (f32[8,64]) {{
  %x = f32[8,64]{{1,0:T(8,128)}} parameter(0)
  %softmax = (f32[64,64]{{1,0:T(8,128)}}, bf16[64,64]{{1,0}}) fusion(%x), calls=%fused, \
metadata={{op_name="jit(f)/call_exported/blocks.0.611/blocks.0.norm.12/aten__add.1/aten__softmax" stack_frame_id=2}}
  %fast = f32[512,512]{{1,0:T(8,128)S(1)}} fusion(%x), calls=%fused
  %gathered = bf16[64,32]{{1,0}} all-gather(%x), metadata={{op_name="jit(f)/call_exported/aten__mm"}}
  %again = bf16[64,32]{{1,0}} all-gather(%x), metadata={{op_name="jit(f)/call_exported/aten__mm"}}
  %updated = f32[999,64]{{1,0}} add(%x, %x)
  ROOT %tuple = (f32[999,64]{{1,0}}) tuple(%updated)
}}
"""


def test_the_largest_temporaries_have_the_names_of_modules_and_lines():
    assert largest_temporaries(TEXT) == [
        ("softmax of 'blocks.0.norm' at model.py:24 f32[64,64]", 4 * 64 * 64), ("mm bf16[64,32]", 2 * 64 * 32)]
    assert largest_temporaries("") == []


def test_collectives_are_counted_with_their_bytes():
    assert count_collectives(TEXT) == {"all-gather": (2, 2 * 2 * 64 * 32)}


def test_the_refused_line_is_the_innermost_of_no_library():
    told = f"""INVALID_ARGUMENT: no such emitter

Suspected Python Code Location:
  {torch.__file__}:16 [softmax]
  /home/me/model.py:24:8 [forward]
  /home/me/train.py:3 [<module>]"""
    assert refusing_place(told) == "model.py:24" and refusing_place("RESOURCE_EXHAUSTED: no memory") == ""
