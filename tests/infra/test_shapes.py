import pytest

from nanollava.infra.shapes import shape_error

SHAPE = {"id": int | str, "n?": range(1, 5), "x?": (0.0, 1.0), "box?": [float, float],
         "rows?": [{"name": str}], "by_name?": {str: bool}}


@pytest.mark.parametrize("value, error", [
    ({"id": 1}, None), ({"id": "1", "n": 4, "x": 1, "box": [1, 2.5], "more": None}, None),
    ({"id": 1, "n": None, "rows": [], "by_name": {}}, None),
    (3, "it must be an object, not 3"), ({}, "it has no 'id'"),
    ({"id": True}, "id must be an integer or a string, not true"),
    ({"id": 1.0}, "id must be an integer or a string, not 1.0"),
    ({"id": 1, "n": 5}, "n must be an integer from 1 to 4, not 5"),
    ({"id": 1, "x": float("nan")}, "x must be a number from 0 to 1, not nan"),
    ({"id": 1, "box": [1, 2, 3]}, "box must be a list of 2, not a list of 3"),
    ({"id": 1, "box": [1, 10**400]}, "box[1] must be a finite number, not 1" + 59 * "0" + "..."),
    ({"id": 1, "rows": [{"name": "a"}, {}]}, "rows[1] has no 'name'"),
    ({"id": 1, "by_name": {"a\n": 0}}, "by_name.'a\\n' must be true or false, not 0"),
])
def test_value_is_checked_against_its_shape(value, error):
    assert shape_error(value, SHAPE) == error
