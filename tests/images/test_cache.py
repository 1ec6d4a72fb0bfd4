from guided_diffusion.images import cache


def test_auto_takes_a_quarter_of_the_memory_at_most(monkeypatch):
    def auto(free):
        monkeypatch.setattr(cache, "_free_memory", lambda shared: (free, free))
        return cache.make_cache("auto", 10, (10, 10, 1), copies=2, shared=False)

    assert auto(8000) is not None
    assert auto(7996) is None


def test_free_memory_is_plausible():
    free, shared = cache._free_memory(shared=True)
    assert 2**20 < free < 2**50
    assert shared > 0
