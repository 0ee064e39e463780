"""The coordinator's HTTP face: web page, JSON API, metrics, health."""
