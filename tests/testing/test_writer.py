from tpuspec import summary
from tpuspec.testing import MemoryWriter


def test_what_a_host_call_writes_is_kept_in_order():
    writer = MemoryWriter()
    with summary.as_default(writer, 3):
        summary.scalar("a", 1.0)
        summary.text("b", "hello", step=4)
        summary.histogram("c", [1, 2])
        summary.image("d", [[0.0]])
    writer.flush()
    writer.close()
    assert writer.records == [("scalar", "a", 1.0, 3), ("text", "b", "hello", 4), ("histogram", "c", [1, 2], 3),
                              ("image", "d", [[0.0]], 3)]
    assert writer.num_flushes == 1
