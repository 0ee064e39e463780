"""The site agent daemon: adverts, admission, model hosts, runners."""
