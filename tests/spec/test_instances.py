import threading

from tpuspec.spec.instances import instances_of


class Base:
    pass


class Child(Base):
    pass


def test_it_finds_instances_of_the_class_and_of_subclasses():
    kept = [Base(), Child(), Child()]
    found = instances_of(Base)
    assert {id(item) for item in found} == {id(item) for item in kept}
    assert {id(item) for item in instances_of(Child)} == {id(item) for item in kept[1:]}


def test_threads_that_make_tuples_meanwhile_are_not_disturbed():
    errors: list[BaseException] = []
    stops = threading.Event()

    def make_tuples() -> None:
        try:
            while not stops.is_set():
                assert len(tuple(i for i in range(500))) == 500
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make_tuples) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        instances_of(Base)
    stops.set()
    for thread in threads:
        thread.join()
    assert not errors
