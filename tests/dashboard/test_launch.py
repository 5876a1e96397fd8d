"""Starting: a free port, loopback unless asked, and settings that give nothing away."""

import socket

import pytest

from headwater.dashboard import launch
from headwater.dashboard.running import models
from headwater.lens.errors import HeadwaterError
from headwater.lens.loading.load import load


def test_a_taken_port_gives_way_to_the_next():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        assert launch.free_port("127.0.0.1", taken) > taken


def test_no_port_left_is_one_line(monkeypatch):
    monkeypatch.setattr(launch, "PORTS_TRIED", 1)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(HeadwaterError, match="no free port") as caught:
            launch.free_port("127.0.0.1", busy.getsockname()[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host):
    assert launch.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org"])
def test_not_loopback(host):
    assert not launch.is_loopback(host)


def test_configuration_is_private():
    settings = launch.configuration("127.0.0.1", 8501)
    assert settings["server.address"] == "127.0.0.1"
    assert settings["server.allowedHosts"] == ["127.0.0.1", "localhost"]
    assert settings["browser.gatherUsageStats"] is False
    assert settings["client.showErrorDetails"] == "none"
    assert settings["client.toolbarMode"] == "viewer"
    assert settings["runner.postScriptGC"] is False  # as running/held.py has it


def test_every_setting_is_known_to_streamlit():
    from streamlit import config

    for name in launch.configuration("127.0.0.1", 8501):
        config.get_option(name)


def test_all_interfaces_still_refuse_foreign_names():
    assert "*" not in launch.served_names("0.0.0.0")
    assert "127.0.0.1" in launch.served_names("0.0.0.0")


def test_an_address_of_six_has_brackets_and_its_name_is_served():
    assert launch.address("::1", 8501) == "http://[::1]:8501"
    assert launch.address("::", 8501) == launch.address("0.0.0.0", 8501) == "http://127.0.0.1:8501"
    assert {"::1", "[::1]"} <= set(launch.served_names("::1"))
    assert "[127.0.0.1]" not in launch.served_names("127.0.0.1")


def test_a_port_that_another_takes_meanwhile_gives_way_to_the_next(monkeypatch):
    served, busy = [], socket.socket()

    class Application:
        def run(self, config):
            served.append(config["server.port"])
            if len(served) == 1:
                busy.bind(("127.0.0.1", served[0]))
                busy.listen()
                raise SystemExit(1)

    monkeypatch.setattr(models, "resident", lambda name: None)
    monkeypatch.setattr(launch, "_application", lambda *given: Application())
    with busy:
        launch.run(port=launch.free_port("127.0.0.1", 9200))
    assert served[1] > served[0]

    def broken(self, config):
        raise SystemExit(3)

    monkeypatch.setattr(Application, "run", broken)
    with pytest.raises(SystemExit, match="3"):
        launch.run()


def test_without_a_name_it_opens_on_the_trained_model_or_says_why_not(monkeypatch, tmp_path, capsys):
    opened = []
    monkeypatch.setattr(models, "_given", {})
    monkeypatch.setattr(models, "resident", opened.append)
    models.open_first()
    assert opened == ["smollm2-135m"]
    assert capsys.readouterr() == ("", "")
    opened.clear()
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    monkeypatch.setattr(
        models, "resident", lambda name: load(name) if name == "smollm2-135m" else opened.append(name)
    )
    models.open_first()
    assert opened == ["tasks-4l"]
    assert models.offered()[0] == "tasks-4l"
    out, told = capsys.readouterr()
    assert out == ""
    assert told == (
        "smollm2-135m has not been added; `headwater models add smollm2-135m` fetches it (93 MB, Apache-2.0). "
        "The dashboard opens on tasks-4l.\n"
    )
