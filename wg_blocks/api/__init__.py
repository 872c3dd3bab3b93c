"""Models behind an API: one file per role, one per provider, and the one client that all calls go through."""

from wg_blocks.api.providers import Endpoint, Provider, ProviderRegistry, close_clients, register_provider

__all__ = ["Endpoint", "Provider", "ProviderRegistry", "close_clients", "register_provider"]
