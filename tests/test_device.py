import pytest

from nanollava.device import best_device
from nanollava.files import InputError


def test_a_device_that_is_not_there_is_told():
    assert best_device("cpu") == "cpu"
    with pytest.raises(InputError, match="--device cpu:1 is not there"):
        best_device("cpu:1")
    with pytest.raises(InputError, match="--device tpu is not there"):
        best_device("tpu")
