// A button in One-Shot Tune that ends the tuning and keeps its weights (nodes/support/stop.py).
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

// The host's translations by language; ours are in locales/*/main.json.
let translations = {};

function texts() {
    const language = String(app.ui.settings.getSettingValue("Comfy.Locale") ?? "en").split("-")[0];
    return (translations[language]?.tuneAVideo ?? translations.en.tuneAVideo).stop;
}

function tell(severity, detail) {
    app.extensionManager.toast.add({ severity, summary: "Tune-A-Video", detail, life: 5000 });
}

async function stop(node) {
    const body = JSON.stringify({ node_id: String(node.id) });
    try {
        const answer = await api.fetchApi("/tune-a-video/stop", {
            method: "POST", headers: { "Content-Type": "application/json" }, body,
        });
        if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
        const { stopping } = await answer.json();
        if (stopping.length) tell("info", texts().stopping);
        else tell("warn", texts().notTuning);
    } catch (error) {
        tell("error", String(error));
    }
}

app.registerExtension({
    name: "tune-a-video.stop",
    async init() {
        translations = await (await api.fetchApi("/i18n")).json();
    },
    nodeCreated(node) {
        if (node.comfyClass !== "TAV_OneShotTune") return;
        const button = node.addWidget("button", texts().button, null, () => stop(node), { serialize: false });
        // Neither saved with the workflow nor sent with the graph.
        button.serialize = false;
    },
});
