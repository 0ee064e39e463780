"""Results that a site serves itself: a bounded store on its disk, and a process of its own that answers over HTTPS."""
