"""The coordinator daemon: queue, placement, failover, commit."""
