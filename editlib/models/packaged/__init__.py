"""Models that are fetched from wheels on PyPI: the catalogue, the fetching and their licences."""
