"""The runtime: request, scheduler, pages, runner, models. See docs/serving.md."""
