"""Which severity map ships after a calibration."""

import pytest
from tiny_training import linear_map
from tiny_training import ship as make_shipped

from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption import severity
from cachemedic.studies.computing.threat_model import ship


@pytest.mark.parametrize(("factor", "replaced"), [(1.001, False), (1.05, True)])
def test_the_map_that_ships_stays_where_calibration_finds_it_again(factor, replaced, monkeypatch, tmp_path) -> None:
    rows = linear_map()
    make_shipped(rows, monkeypatch, tmp_path)
    before = severity.MAP.read_bytes()
    found = SeverityMap(rows.assign(parameter=rows["parameter"] * factor))
    ships = ship(found)
    assert (severity.MAP.read_bytes() != before) == replaced
    expected = found.rows if replaced else rows
    assert sorted(ships.rows["parameter"]) == pytest.approx(sorted(expected["parameter"]), rel=1e-5)
    severity.shipped_map.cache_clear()


def test_a_map_is_written_where_none_ships(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(severity, "MAP", tmp_path / "severity_map.csv")
    severity.shipped_map.cache_clear()
    assert set(ship(SeverityMap(linear_map())).rows["base"]) == {"tiny"}
    severity.shipped_map.cache_clear()
